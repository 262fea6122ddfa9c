// Embedding lookup: out[t] = row ids[t] of the table, dequantised to float32.
//
//   out [tokens, cols] f32; ids [tokens] i32
//   table: F32, BF16 or one of quant_layout.h's panel formats
//   levels: all; plain loops for the panel formats, bound by the cache misses
//   bytes per row: F32 and BF16 the row; Int8 about 16 * cols, the 4-bit formats about 8 * cols
//
// A row of a panel is one dword in each 64-byte line, so the lines of its half panel are touched
// whole: the layout serves the matrix product, and a step gathers few rows.
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int kLanes = static_cast<int>(kHalfPanelRows);
constexpr int kCodesPerDword = 4;
constexpr int kLineBytes = kLanes * kCodesPerDword;
constexpr int kInt8Dwords = static_cast<int>(kGroupSize) / kCodesPerDword;  // Int8Grouped
constexpr int kInt4Dwords = static_cast<int>(kGroupSize) / (2 * kCodesPerDword);

/// Codes of one row and group, as floats: out [32].
QN_INLINE void int8_codes(float* out, const uint8_t* codes, int half, int lane) {
  const uint8_t* dword = codes + half * kInt8Dwords * kLineBytes + lane * kCodesPerDword;
  for (int d = 0; d < kInt8Dwords; ++d, dword += kLineBytes) {
    for (int j = 0; j < kCodesPerDword; ++j) out[kCodesPerDword * d + j] = dword[j];
  }
}

QN_INLINE void int4_codes(float* out, const uint8_t* codes, int half, int lane) {
  const uint8_t* dword = codes + half * kInt4Dwords * kLineBytes + lane * kCodesPerDword;
  for (int d = 0; d < kInt4Dwords; ++d, dword += kLineBytes) {
    for (int j = 0; j < kCodesPerDword; ++j) {
      out[2 * kCodesPerDword * d + j] = static_cast<float>(dword[j] & 15);
      out[2 * kCodesPerDword * d + kCodesPerDword + j] = static_cast<float>(dword[j] >> 4);
    }
  }
}

QN_INLINE float half_at(const uint8_t* scales, int64_t index) {
  uint16_t bits;
  memcpy(&bits, scales + 2 * index, sizeof bits);
  return math::QN_ISA::half_to_float(bits);
}

template <WeightFormat format>
void panel_row(float* out, const WeightView& table, int64_t id) {
  const int64_t row = id % kPanelRows;
  const int half = static_cast<int>(row / kHalfPanelRows),
            lane = static_cast<int>(row % kHalfPanelRows);
  const uint8_t* panel =
      static_cast<const uint8_t*>(table.data) + id / kPanelRows * panel_bytes(format, table.cols);
  float row_scale = 0, row_min = 0;
  if constexpr (format == WeightFormat::Int4) {
    const PanelHeader* header = reinterpret_cast<const PanelHeader*>(panel);
    row_scale = header->row_scale[row];
    row_min = header->row_min[row];
  }
  const uint8_t* block = panel + header_bytes(format);
  for (int64_t col = 0; col < table.cols; col += kGroupSize, block += block_bytes(format)) {
    float codes[kGroupSize];
    float scale, offset;  // weight = scale * code - offset
    if constexpr (format == WeightFormat::Int4) {
      scale = row_scale * static_cast<float>(block[row]);
      offset = row_min * static_cast<float>(block[kPanelRows + row]);
    } else {
      scale = half_at(block, row);
      constexpr float kOffset = format == WeightFormat::Int8Grouped ? 128.0f : 8.0f;
      offset = scale * kOffset;  // exact: a power of two
    }
    if constexpr (format == WeightFormat::Int8Grouped) {
      int8_codes(codes, block + kScaleBytes, half, lane);
    } else {
      int4_codes(codes, block + kScaleBytes, half, lane);
    }
    const int64_t left = table.cols - col;
    const int64_t n = left < kGroupSize ? left : kGroupSize;
    for (int64_t i = 0; i < n; i += Vec::kLanes) {
      const int count = n - i < Vec::kLanes ? static_cast<int>(n - i) : Vec::kLanes;
      fma(Vec(scale), Vec::load(codes + i), Vec::zero() - Vec(offset)).store(out + col + i, count);
    }
  }
}

/// A row of an Int8 panel.
void int8_row(float* out, const WeightView& table, int64_t id) {
  const int64_t row = id % kPanelRows;
  const char* panel = static_cast<const char*>(table.data) +
                      id / kPanelRows * panel_bytes(WeightFormat::Int8, table.cols);
  const float scale = reinterpret_cast<const Int8PanelHeader*>(panel)->row_scale[row];
  const int8_t* half = reinterpret_cast<const int8_t*>(panel + sizeof(Int8PanelHeader)) +
                       row / kHalfPanelRows * (kInt8BlockBytes / 2) +
                       row % kHalfPanelRows * kCodesPerDword;
  for (int64_t col = 0; col < table.cols; ++col) {
    const int64_t in_block = col % kInt8GroupSize;
    out[col] = scale * half[col / kInt8GroupSize * kInt8BlockBytes +
                            in_block / kCodesPerDword * kLineBytes + in_block % kCodesPerDword];
  }
}

template <typename T>
void plain_row(float* out, const WeightView& table, int64_t id) {
  const T* row = static_cast<const T*>(table.data) + id * table.row_stride;
  for (int64_t i = 0; i < table.cols; i += Vec::kLanes) {
    const int64_t left = table.cols - i;
    const int n = left < Vec::kLanes ? static_cast<int>(left) : Vec::kLanes;
    Vec::load(row + i, n).store(out + i, n);
  }
}

}  // namespace

void gather(const GatherArgs& args, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    float* out = args.out + token * args.out_stride;
    const int64_t id = args.ids[token * args.ids_stride];
    switch (args.table.format) {
      case WeightFormat::F32:
        plain_row<float>(out, args.table, id);
        break;
      case WeightFormat::BF16:
        plain_row<bf16>(out, args.table, id);
        break;
      case WeightFormat::Int8:
        int8_row(out, args.table, id);
        break;
      case WeightFormat::Int8Grouped:
        panel_row<WeightFormat::Int8Grouped>(out, args.table, id);
        break;
      case WeightFormat::Int4Symmetric:
        panel_row<WeightFormat::Int4Symmetric>(out, args.table, id);
        break;
      case WeightFormat::Int4:
        panel_row<WeightFormat::Int4>(out, args.table, id);
        break;
      default:
        __builtin_trap();
    }
  }
}

}  // namespace qn::cpu::QN_ISA
