// GEMM with 4-bit weights on AMX tiles with whole columns of int32 sums: the fast path for many
// tokens.
//
//   weight  w8 = round(weight / fold_scale) in int8, one scale per row, unpacked panel by panel
//   x       int8, one scale per token and block of 1024 columns, a limit to what outliers spoil
//   result  fold_scale * sum over the blocks of (x scale * int32 sum) + bias
//
//   level: amx only. Rounding the weights again costs about 0.3 % of the result, the coarser scales
//   of x as much. Unpacking the next panel and the float work of the previous 32 x 32 block are
//   spread over the tile products of the current block, whose ports they do not use. A chunk of x
//   stays in L2 while the panels pass.
#include "kernels/cpu/kernels.h"
#if QN_ISA_LEVEL >= 3
#include "kernels/cpu/amx_tile.h"
#include "kernels/cpu/vec_dot.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int64_t kStepsPerBlock = kFoldedBlockCols / kFoldedTileCols;  // that share a scale of x
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kPrefetchBytes =
    3072;  // of packed weights; matters when few tokens share a panel

/// Turns the units of one packed panel (a group of half its rows) into int8 tiles
/// [step][half][16][64].
class PanelUnpacker {
 public:
  /// packed may be null: nothing to do.
  QN_INLINE void start(const uint8_t* packed, WeightFormat format, int64_t groups, int8_t* out) {
    packed_ = packed;
    out_ = out;
    unit_ = 0;
    units_ = packed != nullptr ? 2 * groups : 0;
    has_min_ = format == WeightFormat::Int4;
    if (packed == nullptr) return;
    // Codes times 128 * scale / fold_scale, in 16 bits: seven fraction bits until the rounding.
    const PanelHeader* header = reinterpret_cast<const PanelHeader*>(packed);
    for (int h = 0; h < 2; ++h) {
      const __m512 fold = _mm512_loadu_ps(header->fold_scale + 16 * h);
      const __mmask16 used = _mm512_cmp_ps_mask(fold, _mm512_setzero_ps(), _CMP_GT_OQ);
      const __m512 inverse = _mm512_maskz_div_ps(used, _mm512_set1_ps(128.0f), fold);
      scale_[h] =
          has_min_ ? _mm512_mul_ps(inverse, _mm512_loadu_ps(header->row_scale + 16 * h)) : inverse;
      min_[h] = _mm512_mul_ps(inverse, _mm512_loadu_ps(header->row_min + 16 * h));
    }
  }

  QN_INLINE bool done() const { return unit_ >= units_; }
  QN_INLINE int64_t units() const { return units_; }

  QN_INLINE void unpack_unit() {
    const int64_t group = unit_ / 2;
    const int half = static_cast<int>(unit_ % 2);
    ++unit_;
    const uint8_t* block = packed_ + sizeof(PanelHeader) + group * kInt4BlockBytes;
    const uint8_t* ahead = block + kPrefetchBytes + half * (kInt4BlockBytes / 2);
    for (int i = 0; i <= kInt4BlockBytes / 2; i += 64) __builtin_prefetch(ahead + i, 0, 3);
    const __m512i rounding = _mm512_set1_epi32(64);
    __m512i factor, offset;
    if (has_min_) {
      factor = fixed_point(load_bytes(block + 16 * half).v, scale_[half]);
      offset =
          _mm512_sub_epi32(fixed_point(load_bytes(block + 32 + 16 * half).v, min_[half]), rounding);
    } else {
      factor = fixed_point(load_halfs(block + 32 * half).v, scale_[half]);
      offset = _mm512_sub_epi32(_mm512_slli_epi32(factor, 3), rounding);
    }
    factor = both_words(factor);
    offset = both_words(offset);
    const __m512i nibble = _mm512_set1_epi16(15);
    const __mmask64 odd_bytes = 0xAAAAAAAAAAAAAAAAull;
    // Results are modulo 2^16; those of codes that occur fit, whatever factor and offset are.
    const auto fold = [&](__m512i even, __m512i odd) {
      even = _mm512_sub_epi16(_mm512_mullo_epi16(even, factor), offset);
      odd = _mm512_sub_epi16(_mm512_mullo_epi16(odd, factor), offset);
      return _mm512_mask_blend_epi8(odd_bytes, _mm512_srli_epi16(even, 7),
                                    _mm512_slli_epi16(odd, 1));
    };
    const uint8_t* codes = block + kScaleBytes + 256 * half;
    int8_t* out = out_ + (group / 2 * 2 + half) * kTileBytes + (group % 2) * 512;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i v = _mm512_loadu_si512(codes + 64 * i);
      const __m512i low =
          fold(_mm512_and_si512(v, nibble), _mm512_and_si512(_mm512_srli_epi16(v, 8), nibble));
      const __m512i high =
          fold(_mm512_and_si512(_mm512_srli_epi16(v, 4), nibble), _mm512_srli_epi16(v, 12));
      _mm512_store_si512(out + 128 * i, low);
      _mm512_store_si512(out + 128 * i + 64, high);
    }
  }

 private:
  static QN_INLINE __m512i fixed_point(__m512 value, __m512 factor) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(value, factor));
  }
  static QN_INLINE __m512i both_words(__m512i x) {
    return _mm512_mask_blend_epi16(0xAAAAAAAAu, x, _mm512_slli_epi32(x, 16));
  }

  const uint8_t* packed_ = nullptr;
  int8_t* out_ = nullptr;
  int64_t unit_ = 0, units_ = 0;
  bool has_min_ = false;
  __m512 scale_[2], min_[2];
};

/// What a thread needs for 32 x 32 results.
struct Staging {
  alignas(64) int32_t sums[4][16][16];  // [token half * 2 + row half][token][row]
  alignas(64) float total[4][16][16];
};

/// Float work of a finished block of columns, a token at a time.
class Epilogue {
 public:
  QN_INLINE void start(const GemmFoldedArgs& a, Staging* staging, int64_t panel, int64_t token,
                       int64_t block, int64_t blocks) {
    staging_ = staging;
    row_ = 0;
    const int64_t left = a.x.tokens - token;
    rows_ = static_cast<int>(left < 32 ? left : 32);
    scale_ = a.x.scale + token * blocks + block;
    scale_stride_ = blocks;
    first_ = block == 0;
    last_ = block + 1 == blocks;
    out_ = a.out + token * a.out_stride + panel * kPanelRows;
  }

  QN_INLINE bool done() const { return row_ >= rows_; }

  /// fold [2], bias [2] and masks [2] are those of the panel's halves.
  QN_INLINE void token(const GemmFoldedArgs& a, const __m512* fold, const __m512* bias,
                       const __mmask16* mask) {
    const int tile = row_ / 16 * 2, t = row_ % 16;
    const __m512 scale = _mm512_set1_ps(scale_[row_ * scale_stride_]);
    float* out = out_ + row_ * a.out_stride;
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(staging_->sums[tile + h][t]));
      float* total = staging_->total[tile + h][t];
      const __m512 before = first_ ? _mm512_setzero_ps() : _mm512_load_ps(total);
      const __m512 y = _mm512_fmadd_ps(sum, scale, before);
      if (last_) {
        __m512 result = _mm512_fmadd_ps(y, fold[h], bias[h]);
        if (a.add) result = _mm512_add_ps(result, _mm512_maskz_loadu_ps(mask[h], out + 16 * h));
        _mm512_mask_storeu_ps(out + 16 * h, mask[h], result);
      } else {
        _mm512_store_ps(total, y);
      }
    }
    ++row_;
  }

 private:
  Staging* staging_ = nullptr;
  int row_ = 0, rows_ = 0;
  const float* scale_ = nullptr;
  int64_t scale_stride_ = 0;
  bool first_ = false, last_ = false;
  float* out_ = nullptr;
};

/// Per-row factors of a panel for the epilogue.
struct PanelFactors {
  __m512 fold[2], bias[2];
  __mmask16 mask[2];

  QN_INLINE PanelFactors(const GemmFoldedArgs& a, const uint8_t* packed, int64_t panel) {
    const PanelHeader* header = reinterpret_cast<const PanelHeader*>(packed);
    for (int h = 0; h < 2; ++h) {
      const int64_t row = panel * kPanelRows + h * kHalfPanelRows;
      const int64_t left = a.rows - row;
      mask[h] = left >= 16 ? 0xffff : left > 0 ? Vec::first(static_cast<int>(left)) : 0;
      fold[h] = _mm512_loadu_ps(header->fold_scale + 16 * h);
      bias[h] =
          a.bias != nullptr ? _mm512_maskz_loadu_ps(mask[h], a.bias + row) : _mm512_setzero_ps();
    }
  }
};

/// One block of columns for 32 tokens (16 when `two` is false) x 32 rows into staging->sums, with
/// side work between.
template <bool two, class Side>
QN_INLINE void multiply_block(const int8_t* x, int64_t x_tile_stride, const int8_t* w,
                              int64_t steps, Staging* staging, Side&& side) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, x + s * kTileBytes, 64);
    _tile_loadd(6, w + s * 2 * kTileBytes, 64);
    _tile_loadd(7, w + s * 2 * kTileBytes + kTileBytes, 64);
    if constexpr (two) _tile_loadd(5, x + x_tile_stride + s * kTileBytes, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if constexpr (two) {
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    side();
  }
  _tile_stored(0, staging->sums[0], 64);
  _tile_stored(1, staging->sums[1], 64);
  if constexpr (two) {
    _tile_stored(2, staging->sums[2], 64);
    _tile_stored(3, staging->sums[3], 64);
  }
}

/// Panels [begin, end) for the tokens [first, last).
void run_panels(const GemmFoldedArgs& a, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t groups = group_count(a.cols), steps = folded_cols(a.cols) / kFoldedTileCols,
                blocks = folded_blocks(a.cols);
  const int64_t panel_size = panel_bytes(a.format, a.cols), x_tile = steps * kTileBytes;
  const uint8_t* weight = static_cast<const uint8_t*>(a.weight);
  Staging* staging = static_cast<Staging*>(a.scratch);
  int8_t* tiles[2];
  tiles[0] = reinterpret_cast<int8_t*>(staging + 1);
  tiles[1] = tiles[0] + 2 * x_tile;
  if (groups % 2 != 0) {  // the last step's second group does not exist
    for (int8_t* t : tiles) memset(t + (steps - 1) * 2 * kTileBytes, 0, 2 * kTileBytes);
  }

  PanelUnpacker unpacker;
  unpacker.start(weight + begin * panel_size, a.format, groups, tiles[0]);
  while (!unpacker.done()) unpacker.unpack_unit();

  const int64_t panel_steps = (last - first + 31) / 32 * steps;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int8_t* w = tiles[(panel - begin) % 2];
    const uint8_t* next = panel + 1 < end ? weight + (panel + 1) * panel_size : nullptr;
    unpacker.start(next, a.format, groups, tiles[(panel - begin + 1) % 2]);
    const PanelFactors factors(a, weight + panel * panel_size, panel);
    Epilogue epilogue;
    int64_t credit = 0;
    for (int64_t token = first; token < last; token += 32) {
      const bool two = last - token > kTokenTile;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t step = block * kStepsPerBlock;
        const int64_t block_steps = steps - step < kStepsPerBlock ? steps - step : kStepsPerBlock;
        const int tokens_per_step = static_cast<int>((32 + block_steps - 1) / block_steps);
        const auto side = [&] {
          for (int i = 0; i < tokens_per_step && !epilogue.done(); ++i) {
            epilogue.token(a, factors.fold, factors.bias, factors.mask);
          }
          for (credit += unpacker.units(); credit >= panel_steps; credit -= panel_steps) {
            if (!unpacker.done()) unpacker.unpack_unit();
          }
        };
        const int8_t* x = a.x.codes + token / kTokenTile * x_tile + step * kTileBytes;
        if (two) {
          multiply_block<true>(x, x_tile, w + step * 2 * kTileBytes, block_steps, staging, side);
        } else {
          multiply_block<false>(x, x_tile, w + step * 2 * kTileBytes, block_steps, staging, side);
        }
        epilogue.start(a, staging, panel, token, block, blocks);
      }
    }
    while (!epilogue.done()) epilogue.token(a, factors.fold, factors.bias, factors.mask);
    while (!unpacker.done()) unpacker.unpack_unit();
  }
}

}  // namespace

void fold_activations(const FoldActivationsArgs& a, int64_t begin, int64_t end) {
  const int64_t steps = folded_cols(a.cols) / kFoldedTileCols, blocks = folded_blocks(a.cols);
  for (int64_t token = begin * kTokenTile; token < end * kTokenTile; ++token) {
    int8_t* out = a.out.codes +
                  (token / kTokenTile * steps * kTokenTile + token % kTokenTile) * kFoldedTileCols;
    const float* x = a.x + token * a.x_stride;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t column = block * kStepsPerBlock * kFoldedTileCols;
      const int64_t block_end = column + kStepsPerBlock * kFoldedTileCols;
      const int64_t valid =
          token < a.out.tokens ? (a.cols < block_end ? a.cols : block_end) : column;
      const int64_t padded =
          steps * kFoldedTileCols < block_end ? steps * kFoldedTileCols : block_end;
      const auto load = [&](int64_t c) {
        const int64_t left = valid - c;
        return left >= 16 ? _mm512_loadu_ps(x + c)
               : left > 0 ? _mm512_maskz_loadu_ps(Vec::first(static_cast<int>(left)), x + c)
                          : _mm512_setzero_ps();
      };
      // As integers, magnitudes with NaN and infinity are the largest.
      __m512i largest_bits = _mm512_setzero_si512();
      for (int64_t c = column; c < valid; c += 16) {
        largest_bits = _mm512_max_epi32(largest_bits, _mm512_castps_si512(_mm512_abs_ps(load(c))));
      }
      const ActivationScale scale = activation_scale(_mm512_reduce_max_epi32(largest_bits));
      a.out.scale[token * blocks + block] = scale.scale;
      const __m512 inverse = _mm512_set1_ps(scale.inverse);
      for (int64_t c = column; c < padded; c += 16) {
        const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(load(c), inverse));
        const __m512i finite = scale.finite ? codes : _mm512_setzero_si512();
        _mm_store_si128(reinterpret_cast<__m128i*>(out + c / kFoldedTileCols * kTileBytes +
                                                   c % kFoldedTileCols),
                        _mm512_cvtepi32_epi8(finite));
      }
    }
  }
}

void gemm_int4_folded(const GemmFoldedArgs& a, int64_t begin, int64_t end) {
  const TileScope tiles;
  const int64_t panels = panel_count(a.rows);
  while (begin < end) {
    const int64_t chunk = begin / panels, panel = begin % panels;
    const int64_t count = end - begin < panels - panel ? end - begin : panels - panel;
    const int64_t first = chunk * a.chunk_tokens;
    const int64_t last = first + a.chunk_tokens < a.x.tokens ? first + a.chunk_tokens : a.x.tokens;
    run_panels(a, panel, panel + count, first, last);
    begin += count;
  }
}

}  // namespace qn::cpu::QN_ISA
#endif
