// In-memory layouts of quantised weights, the same bytes at every level, on the CPU for GEMV, GEMM
// and gather alike.
//
// A weight [rows, cols] is cut into panels of 32 rows, a panel into groups of 32 columns (Int8: of
// 64). Rows and columns are padded to whole panels and groups; padding has scale 0 or code 0. A
// panel is its header followed by one block per group:
//
//   Int8            header (128 B): float row_scale[32]
//                   block (2048 B): int8 code[2][16][16][4]
//                   weight = row_scale * code
//   Int8Grouped     header: none
//                   block (1088 B): half scale[32]; uint8 code[2][8][16][4]
//                   weight = scale * (code - 128)
//   Int4Symmetric   header (384 B): see PanelHeader; row_scale and row_min unused
//                   block (576 B): half scale[32]; uint8 codes[2][4][16][4]
//                   weight = scale * (code - 8)
//   Int4            header (384 B)
//                   block (576 B): uint8 scale[32]; uint8 min[32]; uint8 codes[2][4][16][4]
//                   weight = row_scale * scale * code - row_min * min
//
// Codes: [half of the panel: 16 rows][columns][row within the half][column within the dword], so
// that one 64-byte vector holds one dword (4 columns at 8 bits) of sixteen rows: the operand of a
// VNNI dot product and a row of an AMX B tile. At 4 bits a byte holds two codes: dword i, byte j =
// column 8i + j (low nibble) and 8i + 4 + j (high nibble). Grouped codes are stored unsigned: they
// are the unsigned operand of vpdpbusd, activations the signed one, and the offset (128 or 8) times
// the group's sum of activations is subtracted once per group. Those of Int8 are signed, -127 to
// 127: a block is two tiles as AMX multiplies them.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace qn {

/// F32 and BF16 weights are plain row-major matrices, used where the checkpoint is mapped.
enum class WeightFormat : uint8_t { F32, BF16, Int8, Int8Grouped, Int4Symmetric, Int4 };

constexpr int64_t kPanelRows = 32;
constexpr int64_t kHalfPanelRows = 16;
constexpr int64_t kGroupSize = 32;
constexpr int64_t kInt8GroupSize = 64;
constexpr int64_t kInt8BlockBytes = 2048;
constexpr int64_t kInt8GroupedBlockBytes = 64 + 1024;
constexpr int64_t kInt4BlockBytes = 64 + 512;
constexpr int64_t kScaleBytes = 64;  // scales (and mins) at the start of a block

/// Start of every Int8 panel.
struct Int8PanelHeader {
  float row_scale[kPanelRows];
};

/// Start of every 4-bit panel.
struct PanelHeader {
  float row_scale[kPanelRows];
  float row_min[kPanelRows];
  float fold_scale[kPanelRows];  // max |weight| of the row / 127: its scale as int8 for AMX
};

/// A weight matrix; out = x W^T, so `rows` is the number of outputs.
struct WeightView {
  const void* data;
  WeightFormat format;
  int64_t rows, cols;
  int64_t row_stride;  // elements, F32 and BF16 only
};

constexpr bool is_quantized(WeightFormat format) { return format >= WeightFormat::Int8; }

constexpr int64_t panel_count(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

constexpr int64_t group_count(int64_t cols) { return (cols + kGroupSize - 1) / kGroupSize; }

constexpr int64_t block_bytes(WeightFormat format) {
  return format == WeightFormat::Int8          ? kInt8BlockBytes
         : format == WeightFormat::Int8Grouped ? kInt8GroupedBlockBytes
                                               : kInt4BlockBytes;
}

constexpr int64_t header_bytes(WeightFormat format) {
  return format == WeightFormat::Int8          ? static_cast<int64_t>(sizeof(Int8PanelHeader))
         : format == WeightFormat::Int8Grouped ? 0
                                               : static_cast<int64_t>(sizeof(PanelHeader));
}

constexpr int64_t block_count(WeightFormat format, int64_t cols) {
  const int64_t size = format == WeightFormat::Int8 ? kInt8GroupSize : kGroupSize;
  return (cols + size - 1) / size;
}

constexpr int64_t panel_bytes(WeightFormat format, int64_t cols) {
  return header_bytes(format) + block_count(format, cols) * block_bytes(format);
}

/// Types of tensors in checkpoint files: plain floats and GGUF's blocks (ggml's names).
enum class SourceType : uint8_t {
  F32,
  F16,
  BF16,
  Q4_0,
  Q4_1,
  Q5_0,
  Q5_1,
  Q8_0,
  Q2_K,
  Q3_K,
  Q4_K,
  Q5_K,
  Q6_K
};

/// Elements and bytes of one block of a source type; plain floats are blocks of one.
struct SourceBlock {
  int64_t elements, bytes;
};

constexpr SourceBlock kSourceBlocks[] = {
    {1, 4},     {1, 2},     {1, 2},                // F32 F16 BF16
    {32, 18},   {32, 20},   {32, 22},   {32, 24},  // Q4_0 Q4_1 Q5_0 Q5_1
    {32, 34},                                      // Q8_0
    {256, 84},  {256, 110}, {256, 144},            // Q2_K Q3_K Q4_K
    {256, 176}, {256, 210},                        // Q5_K Q6_K
};

constexpr SourceBlock source_block(SourceType source) {
  return kSourceBlocks[static_cast<int>(source)];
}

/// Bytes of one row of a checkpoint tensor whose columns are whole blocks.
constexpr int64_t source_row_bytes(SourceType source, int64_t cols) {
  return cols / source_block(source).elements * source_block(source).bytes;
}

}  // namespace qn
