// Exact conversions of GGUF's 32-column blocks to panels: same scale, same codes, other order.
//
//   data   rows of Q4_0, Q5_0 or Q8_0 blocks at any address
//   out    panels of Int8Grouped (all three) or Int4Symmetric (Q4_0), see quant_layout.h
//   levels: all; integer work on eight codes per 64-bit word, bound by memory
//   bytes per 32 weights: Q8_0 34 read, Q5_0 22, Q4_0 18; 34 (Int8Grouped) or 18 (Int4Symmetric)
//   written
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr uint64_t kBytes = 0x0101010101010101u;  // one in every byte
constexpr int kWords = kGroupSize / 8;
constexpr int kDwords = kGroupSize / 4;

QN_INLINE uint64_t word_at(const uint8_t* p) {
  uint64_t word;
  memcpy(&word, p, sizeof word);
  return word;
}

/// Codes of one block, raised so that `offset` stands for zero. No byte overflows: the source's
/// codes have 4 or 5 bits, or are signed bytes whose range is turned by the xor.
template <SourceType kSource>
QN_INLINE void load_codes(const uint8_t* block, unsigned offset, uint64_t* codes) {
  if constexpr (kSource == SourceType::Q8_0) {
    for (int i = 0; i < kWords; ++i) codes[i] = word_at(block + 2 + 8 * i) ^ 128 * kBytes;
  } else if constexpr (kSource == SourceType::Q4_0) {
    const uint64_t raise = (offset - 8) * kBytes;
    for (int i = 0; i < 2; ++i) {
      const uint64_t pairs = word_at(block + 2 + 8 * i);
      codes[i] = (pairs & 15 * kBytes) + raise;
      codes[i + 2] = (pairs >> 4 & 15 * kBytes) + raise;
    }
  } else {
    const uint64_t raise = (offset - 16) * kBytes;
    for (int i = 0; i < kWords; ++i) {
      const uint64_t pairs = word_at(block + 6 + 8 * (i % 2));
      const uint64_t low = (i < 2 ? pairs : pairs >> 4) & 15 * kBytes;
      // The byte's bit j selects byte j, then any bit left of it is carried to that byte's top.
      const uint64_t spread = (block[2 + i] * kBytes) & 0x8040201008040201u;
      const uint64_t high = ((spread + 0x7f * kBytes) & 0x80 * kBytes) >> 3;
      codes[i] = (low | high) + raise;
    }
  }
}

template <SourceType kSource, WeightFormat kFormat>
void repack_panel(const RepackArgs& a, int64_t panel) {
  constexpr bool kNarrow = kFormat == WeightFormat::Int4Symmetric;
  constexpr unsigned kOffset = kNarrow ? 8 : 128;
  constexpr int64_t kBlockBytes = source_block(kSource).bytes;
  const int64_t row_bytes = source_row_bytes(kSource, a.cols);
  const int64_t first_row = panel * kPanelRows;
  const int64_t live = a.rows - first_row < kPanelRows ? a.rows - first_row : kPanelRows;
  const uint8_t* rows = static_cast<const uint8_t*>(a.data) + first_row * row_bytes;
  uint8_t* out = static_cast<uint8_t*>(a.out) + panel * panel_bytes(kFormat, a.cols);
  float largest[kPanelRows] = {};

  uint8_t* block_out = out + header_bytes(kFormat);
  for (int64_t group = 0; group < a.cols / kGroupSize; ++group) {
    uint16_t scales[kPanelRows] = {};
    uint32_t dwords[kPanelRows][kDwords];
    for (int64_t row = 0; row < kPanelRows; ++row) {
      uint64_t codes[kWords] = {kOffset * kBytes, kOffset * kBytes, kOffset * kBytes,
                                kOffset * kBytes};
      if (row < live) {
        const uint8_t* block = rows + row * row_bytes + group * kBlockBytes;
        memcpy(&scales[row], block, sizeof scales[row]);
        load_codes<kSource>(block, kOffset, codes);
        const bool finite = (scales[row] & 0x7c00u) != 0x7c00u;
        if (!finite && first_row + row < *a.rejected) *a.rejected = first_row + row;
      }
      memcpy(dwords[row], codes, sizeof codes);
      if constexpr (kNarrow) {
        int furthest = 0;
        uint8_t bytes[kGroupSize];
        memcpy(bytes, codes, sizeof bytes);
        for (int k = 0; k < kGroupSize; ++k) {
          const int distance = bytes[k] < 8 ? 8 - bytes[k] : bytes[k] - 8;
          furthest = distance > furthest ? distance : furthest;
        }
        const float magnitude =
            fabsf(math::QN_ISA::half_to_float(scales[row]) * static_cast<float>(furthest));
        largest[row] = magnitude > largest[row] ? magnitude : largest[row];
      }
    }
    memcpy(block_out, scales, sizeof scales);
    uint8_t* codes_out = block_out + kScaleBytes;
    for (int64_t half = 0; half < kPanelRows; half += kHalfPanelRows) {
      for (int i = 0; i < (kNarrow ? kDwords / 2 : kDwords); ++i) {
        uint32_t line[kHalfPanelRows];
        for (int64_t row = 0; row < kHalfPanelRows; ++row) {
          const uint32_t* from = dwords[half + row];
          line[row] = kNarrow ? from[2 * i] | from[2 * i + 1] << 4 : from[i];
        }
        memcpy(codes_out, line, sizeof line);
        codes_out += sizeof line;
      }
    }
    block_out += block_bytes(kFormat);
  }
  if constexpr (kNarrow) {
    PanelHeader header = {};
    for (int64_t row = 0; row < kPanelRows; ++row) header.fold_scale[row] = largest[row] / 127.0f;
    memcpy(out, &header, sizeof header);
  }
}

}  // namespace

void repack(const RepackArgs& args, int64_t begin, int64_t end) {
  void (*panel_fn)(const RepackArgs&, int64_t) = nullptr;
  if (args.format == WeightFormat::Int4Symmetric) {
    panel_fn = repack_panel<SourceType::Q4_0, WeightFormat::Int4Symmetric>;
  } else if (args.source == SourceType::Q8_0) {
    panel_fn = repack_panel<SourceType::Q8_0, WeightFormat::Int8Grouped>;
  } else if (args.source == SourceType::Q5_0) {
    panel_fn = repack_panel<SourceType::Q5_0, WeightFormat::Int8Grouped>;
  } else {
    panel_fn = repack_panel<SourceType::Q4_0, WeightFormat::Int8Grouped>;
  }
  for (int64_t panel = begin; panel < end; ++panel) panel_fn(args, panel);
}

}  // namespace qn::cpu::QN_ISA
