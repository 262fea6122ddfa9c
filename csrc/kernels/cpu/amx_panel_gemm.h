// The exact GEMM of vec_panel_gemm.h on AMX tiles, for many tokens: the same int32 sums per group
// and the same float operations in the same order, hence the same bits.
//
//   panel, once per run   codes to int8 (code - offset), [group][half][8][64]; scales to float
//   16 tokens x 32 rows   two tile products per group, A [16 tokens][32], B [8][16 rows][4]; the
//                         sums of eight groups are stored, then added to sixteen registers of
//                         floats, one half of the panel after the other
#pragma once
#include "kernels/cpu/amx_tile.h"
#include "kernels/cpu/vec_panel_gemm.h"

namespace qn::cpu::QN_ISA {

/// From this many tokens on the tiles are faster than VNNI.
constexpr int64_t kTileTokens = 16;

/// A panel as the tiles want it; its memory is the thread's scratch.
struct UnpackedPanel {
  int8_t* codes;  // [groups][half][8][16][4]
  float* scale;   // [groups][32]
  float* offset;  // [groups][32], Int4 only

  static QN_INLINE UnpackedPanel at(void* scratch, int64_t groups) {
    UnpackedPanel panel;
    panel.codes = static_cast<int8_t*>(scratch);
    panel.scale = reinterpret_cast<float*>(panel.codes + groups * 1024);
    panel.offset = panel.scale + groups * kPanelRows;
    return panel;
  }
};

template <class Format>
void unpack_panel(const uint8_t* packed, int64_t groups, const UnpackedPanel& panel) noexcept {
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* block = packed + Format::kHeader + g * Format::kBlock;
    const uint8_t* codes = block + kScaleBytes;
    int8_t* out = panel.codes + g * 1024;
    if constexpr (Format::kBits == 8) {
      const __m512i sign = _mm512_set1_epi8(-128);
      for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(out + 64 * i, _mm512_xor_si512(Codes::load(codes + 64 * i).v, sign));
      }
    } else {
      const __m512i offset = _mm512_set1_epi8(8);
      for (int i = 0; i < 8; ++i) {
        const Codes both = Codes::load(codes + 64 * i);
        _mm512_store_si512(out + 128 * i, _mm512_sub_epi8(both.low().v, offset));
        _mm512_store_si512(out + 128 * i + 64, _mm512_sub_epi8(both.high().v, offset));
      }
    }
    for (int h = 0; h < kHalves; ++h) {
      float* scale = panel.scale + g * kPanelRows + h * kHalfPanelRows;
      if constexpr (Format::kHasMin) {
        const Vec bytes = load_bytes(block + 16 * h);
        bytes.store(scale);
        int4_offset(bytes, load_bytes(block + 32 + 16 * h),
                    reinterpret_cast<const PanelHeader*>(packed), h)
            .store(panel.offset + g * kPanelRows + h * kHalfPanelRows);
      } else {
        load_halfs(block + 32 * h).store(scale);
      }
    }
  }
}

/// Groups whose sums are stored before the float work on them: tile products follow one another
/// without waiting, and 16 KB of sums stay in L1.
constexpr int64_t kGroupsPerPass = 8;

/// Adds the products of one pass of groups to totals [half][token][row].
QN_INLINE void multiply_groups(const int8_t* x, int64_t x_group, const float* x_scale,
                               int64_t scale_group, const UnpackedPanel& panel, int64_t first,
                               int64_t last, float totals[kHalves][16][16]) {
  alignas(64) int32_t sums[kGroupsPerPass][kHalves][16][16];
  for (int64_t g = first; g < last; ++g) {
    const int8_t *group_x = x + g * x_group, *codes = panel.codes + g * 1024;
    auto& sum = sums[g - first];
    _tile_zero(0);
    _tile_zero(1);
    multiply_tiles<true, 1, 2>(group_x, nullptr, kGroupSize, codes, codes + 512, 64);
    _tile_stored(0, sum[0], 64);
    _tile_stored(1, sum[1], 64);
  }
  for (int h = 0; h < kHalves; ++h) {
    __m512 y[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) y[t] = _mm512_load_ps(totals[h][t]);
    for (int64_t g = first; g < last; ++g) {
      const __m512 scale = _mm512_load_ps(panel.scale + g * kPanelRows + h * kHalfPanelRows);
      const float* group_scale = x_scale + g * scale_group;
#pragma GCC unroll 16
      for (int t = 0; t < 16; ++t) {
        y[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[g - first][h][t])),
                               _mm512_mul_ps(scale, _mm512_set1_ps(group_scale[t])), y[t]);
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) _mm512_store_ps(totals[h][t], y[t]);
  }
}

/// Offsets, bias and the store of one half; result [token][row].
template <class Format>
QN_INLINE void finish_half(const GemmQuantizedArgs& a, const UnpackedPanel& panel,
                           const PanelHeader* header, int64_t row, int half, int64_t token,
                           const ActivationSlot& slot, float result[16][16]) {
  if constexpr (Format::kHasMin) {
    const int64_t groups = group_count(a.cols);
    const float* offsets = panel.offset + half * kHalfPanelRows;
    const float* scaled_sum = a.x.scaled_sum + slot.first;
    __m512 z[16];
    for (__m512& v : z) v = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
      const __m512 offset = _mm512_load_ps(offsets + g * kPanelRows);
      const float* group_sum = scaled_sum + g * slot.stride;
#pragma GCC unroll 16
      for (int t = 0; t < 16; ++t) {
        z[t] = _mm512_fmadd_ps(offset, _mm512_set1_ps(group_sum[t]), z[t]);
      }
    }
    const Vec row_scale = Vec::load(header->row_scale + half * kHalfPanelRows);
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) {
      fma(row_scale, Vec::load(result[t]), Vec(z[t])).store(result[t]);
    }
  }
  const int n = a.rows - row < Vec::kLanes ? static_cast<int>(a.rows - row) : Vec::kLanes;
  const Vec bias = a.bias != nullptr ? Vec::load(a.bias + row, n) : Vec::zero();
  for (int64_t t = 0; t < slot.stride; ++t) {
    Vec value = Vec::load(result[t]);
    if (a.bias != nullptr) value = value + bias;
    float* out = a.out + (token + t) * a.out_stride + row;
    if (a.add) value = Vec::load(out, n) + value;
    value.store(out, n);
  }
}

/// Up to sixteen tokens times a panel.
template <class Format>
QN_INLINE void tile_block(const GemmQuantizedArgs& a, const UnpackedPanel& panel,
                          const PanelHeader* header, int64_t first_row, int64_t token) {
  const int64_t groups = group_count(a.cols);
  const ActivationSlot slot = activation_slot(token, a.x.tokens, groups);
  alignas(64) float totals[kHalves][16][16] = {};
  for (int64_t g = 0; g < groups; g += kGroupsPerPass) {
    multiply_groups(a.x.codes + slot.first * kGroupSize, slot.stride * kGroupSize,
                    a.x.scale + slot.first, slot.stride, panel, g,
                    g + kGroupsPerPass < groups ? g + kGroupsPerPass : groups, totals);
  }
  for (int half = 0; half < kHalves; ++half) {
    const int64_t row = first_row + half * kHalfPanelRows;
    if (row < a.rows) finish_half<Format>(a, panel, header, row, half, token, slot, totals[half]);
  }
}

/// Panels [begin, end).
template <class Format>
void gemm_panels_tiles(const GemmQuantizedArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = group_count(a.cols);
  const int64_t panel_size = Format::kHeader + groups * Format::kBlock;
  const UnpackedPanel unpacked = UnpackedPanel::at(a.scratch, groups);
  TileConfig config;
  const int used[] = {0, 1, 4, 6};  // sums, x, weights
  for (const int tile : used) {
    config.rows[tile] = tile == 6 ? 8 : 16;
    config.row_bytes[tile] = tile == 4 ? kGroupSize : 64;
  }
  const TileScope tiles(config);
  for (int64_t panel = begin; panel < end; ++panel) {
    const uint8_t* packed = static_cast<const uint8_t*>(a.weight) + panel * panel_size;
    unpack_panel<Format>(packed, groups, unpacked);
    const PanelHeader* header = reinterpret_cast<const PanelHeader*>(packed);
    for (int64_t token = 0; token < a.x.tokens; token += kTokenTile) {
      tile_block<Format>(a, unpacked, header, panel * kPanelRows, token);
    }
  }
}

}  // namespace qn::cpu::QN_ISA
