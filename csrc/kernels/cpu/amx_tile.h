// AMX tile configuration as a scope. Level amx only.
//
//   tiles 0-3   C: up to 16 rows x 16 dwords        tiles 4-5   A: up to 16 rows x 64 bytes
//                                                   tiles 6-7   B: 16 rows x 64 bytes
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace qn::cpu::QN_ISA {

/// The 64-byte operand of ldtilecfg (Intel SDM, "LDTILECFG").
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

/// Configures this thread's tiles for the lifetime of the scope and then puts back the
/// configuration that it found. Every kernel run opens its own: tiles fault without a
/// configuration, and other libraries on the same thread have theirs, which some of them
/// (llama.cpp) load only once and then rely on.
class TileScope {
 public:
  /// All tiles 16 rows x 64 bytes, but A (4, 5) and C (0-3) with `a_rows` rows.
  explicit __attribute__((always_inline)) TileScope(int a_rows = 16) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(tile < 6 ? a_rows : 16);
    }
    load(config);
  }
  explicit __attribute__((always_inline)) TileScope(const TileConfig& config) { load(config); }
  __attribute__((always_inline)) ~TileScope() {
    if (caller_.palette != 0) {
      configure(caller_);
    } else {
      _tile_release();
    }
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  __attribute__((always_inline)) void load(const TileConfig& config) {
    _tile_storeconfig(&caller_);
    asm volatile("" ::"r"(&caller_) : "memory");  // gcc 12: see configure
    configure(config);
  }
  static __attribute__((always_inline)) void configure(const TileConfig& config) {
    // gcc 12 declares only 8 bytes of the operand as read and would drop the stores to the rest.
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }

  TileConfig caller_;
};

/// C (tile 2 i + j) += A_i (tile 4) B_j (tile 6) for i < M, j < N: one step of a block of up to 2 x
/// 2 tiles. A_0 is loaded a second time rather than kept: with six of the eight tile registers in
/// use a step costs the same in quiet minutes and two thirds beside busy neighbours, which
/// presumably take a share of the core's physical registers.
template <bool kInt8, int M, int N>
inline __attribute__((always_inline)) void multiply_tiles(const void* a0, const void* a1,
                                                          int64_t a_stride, const void* b0,
                                                          const void* b1, int64_t b_stride) {
#define QN_TILE_PRODUCT(c)   \
  if constexpr (kInt8) {     \
    _tile_dpbssd(c, 4, 6);   \
  } else {                   \
    _tile_dpbf16ps(c, 4, 6); \
  }
  _tile_loadd(4, a0, a_stride);
  _tile_loadd(6, b0, b_stride);
  QN_TILE_PRODUCT(0)
  if constexpr (M > 1) {
    _tile_loadd(4, a1, a_stride);
    QN_TILE_PRODUCT(2)
  }
  if constexpr (N > 1) {
    _tile_loadd(6, b1, b_stride);
    if constexpr (M > 1) {
      QN_TILE_PRODUCT(3)
      _tile_loadd(4, a0, a_stride);
    }
    QN_TILE_PRODUCT(1)
  }
#undef QN_TILE_PRODUCT
}

/// out[j] = column j of the row-major 16 rows at `in`, which are 16 dwords apart; four columns. The
/// inserts take their operand from memory and leave the shuffle port to the rest.
inline __attribute__((always_inline)) void transpose4(const float* in, __m512 out[4]) {
  const auto every_fourth = [in](int row) {  // four columns of rows row, row + 4, + 8, + 12
    const float* p = in + row * 16;
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 4 * 16), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 8 * 16), 2);
    return _mm512_insertf32x4(v, _mm_loadu_ps(p + 12 * 16), 3);
  };
  const __m512 r0 = every_fourth(0), r1 = every_fourth(1);
  const __m512 r2 = every_fourth(2), r3 = every_fourth(3);
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
  const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
  const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
  out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
  out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
  out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
  out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
}

/// out[j] = column j of the row-major 16 x 16 dwords at `in`.
inline __attribute__((always_inline)) void transpose16(const float* in, __m512 out[16]) {
  for (int column = 0; column < 16; column += 4) transpose4(in + column, out + column);
}

}  // namespace qn::cpu::QN_ISA
