// What the folded GEMMs share: int8 tiles of sixteen plus sixteen weight rows, times a chunk of
// folded activations, with the float work hidden between the tile products. Level amx only.
//
//   weight  int8, one scale per row. Int8 panels are tiles as they lie and are prefetched a pair
//           ahead. 4-bit ones are w8 = round(weight / fold_scale); a pair of half panels is
//           unpacked to [step of 64 columns][side][16][64] before its products: spread between them
//           the unpacking costs three times as much, because its stores delay the tile loads
//   x       int8, one scale per token and block of columns (FoldedActivations)
//   y       sum over the blocks of x scale * int32 sum, given to a Sink, which multiplies by the
//           rows' scales; the float operations are those of gemm_int8.cpp, in the same order
//
// A Sink takes the two vectors of sixteen sums that a token has with a pair:
//   start(pair, scale[2])  before the first of them
//   row(token, y[2])       each token of the chunk once
#pragma once
#include "kernels/cpu/amx_tile.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec_dot.h"

namespace qn::cpu::QN_ISA {

constexpr int64_t kTileBytes = 1024;
/// Bytes between the steps of a half panel's tiles.
constexpr int64_t kStepBytes = 2 * kTileBytes;
/// Of packed 4-bit weights; matters when few tokens share a panel.
constexpr int64_t kFoldedPrefetchBytes = 3072;

/// Sixteen rows of a packed panel.
struct HalfPanel {
  const uint8_t* packed;  // the panel
  int half;
  WeightFormat format;

  QN_INLINE __m512 scale() const {
    const float* scales = format == WeightFormat::Int8
                              ? reinterpret_cast<const Int8PanelHeader*>(packed)->row_scale
                              : reinterpret_cast<const PanelHeader*>(packed)->fold_scale;
    return _mm512_loadu_ps(scales + kHalfPanelRows * half);
  }
  /// Int8 only: [step] tiles, kStepBytes apart.
  QN_INLINE const int8_t* tiles() const {
    return reinterpret_cast<const int8_t*>(packed) + sizeof(Int8PanelHeader) + kTileBytes * half;
  }
};

struct PanelPair {
  HalfPanel side[2];
};

/// Sixteen rows of a packed 4-bit panel as int8 tiles, [step of 64 columns][16][64], kStepBytes
/// between the steps.
template <bool has_min>
QN_INLINE void unpack_half(const HalfPanel& half, int64_t groups, int8_t* out) {
  // Codes times 128 * scale / fold_scale, in 16 bits: seven fraction bits until the rounding.
  const PanelHeader* header = reinterpret_cast<const PanelHeader*>(half.packed);
  const int first = half.half * static_cast<int>(kHalfPanelRows);
  const __m512 fold = half.scale();
  const __mmask16 used = _mm512_cmp_ps_mask(fold, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(used, _mm512_set1_ps(128.0f), fold);
  const __m512 row_scale =
      has_min ? _mm512_mul_ps(inverse, _mm512_loadu_ps(header->row_scale + first)) : inverse;
  const __m512 row_min = _mm512_mul_ps(inverse, _mm512_loadu_ps(header->row_min + first));
  const auto fixed_point = [](Vec value, __m512 factor) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(value.v, factor));
  };
  const auto both_words = [](__m512i x) {
    return _mm512_mask_blend_epi16(0xAAAAAAAAu, x, _mm512_slli_epi32(x, 16));
  };
  const __m512i nibble = _mm512_set1_epi16(15), rounding = _mm512_set1_epi32(64);
  const __mmask64 odd_bytes = 0xAAAAAAAAAAAAAAAAull;

  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* block = half.packed + sizeof(PanelHeader) + g * kInt4BlockBytes;
    const uint8_t* codes = block + kScaleBytes + 256 * half.half;
    for (int i = 0; i < 256; i += 64) __builtin_prefetch(codes + kFoldedPrefetchBytes + i, 0, 3);
    __m512i factor, offset;
    if constexpr (has_min) {
      factor = fixed_point(load_bytes(block + first), row_scale);
      offset = _mm512_sub_epi32(fixed_point(load_bytes(block + 32 + first), row_min), rounding);
    } else {
      factor = fixed_point(load_halfs(block + 2 * first), row_scale);
      offset = _mm512_sub_epi32(_mm512_slli_epi32(factor, 3), rounding);
    }
    factor = both_words(factor);
    offset = both_words(offset);
    // Results are modulo 2^16; those of codes that occur fit, whatever factor and offset are.
    const auto fold_codes = [&](__m512i even, __m512i odd) {
      even = _mm512_sub_epi16(_mm512_mullo_epi16(even, factor), offset);
      odd = _mm512_sub_epi16(_mm512_mullo_epi16(odd, factor), offset);
      return _mm512_mask_blend_epi8(odd_bytes, _mm512_srli_epi16(even, 7),
                                    _mm512_slli_epi16(odd, 1));
    };
    int8_t* tile = out + g / 2 * kStepBytes + g % 2 * 512;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i v = _mm512_loadu_si512(codes + 64 * i);
      const __m512i low = fold_codes(_mm512_and_si512(v, nibble),
                                     _mm512_and_si512(_mm512_srli_epi16(v, 8), nibble));
      const __m512i high =
          fold_codes(_mm512_and_si512(_mm512_srli_epi16(v, 4), nibble), _mm512_srli_epi16(v, 12));
      _mm512_store_si512(tile + 128 * i, low);
      _mm512_store_si512(tile + 128 * i + 64, high);
    }
  }
}

/// Where the tiles of one side are; 4-bit ones are unpacked to `out`.
QN_INLINE const int8_t* tiles_of(const HalfPanel& half, int64_t groups, int8_t* out) {
  if (half.format == WeightFormat::Int8) return half.tiles();
  if (half.format == WeightFormat::Int4) {
    unpack_half<true>(half, groups, out);
  } else {
    unpack_half<false>(half, groups, out);
  }
  return out;
}

/// Brings the Int8 tiles of a pair to L2, some lines at a time.
class PairPrefetch {
 public:
  QN_INLINE void start(const PanelPair& pair, int64_t steps, int64_t lines_per_call) {
    lines_ = lines_per_call;
    line_ = 0;
    end_ = 0;
    for (int s = 0; s < 2; ++s) {
      if (pair.side[s].format != WeightFormat::Int8) return;
      tiles_[s] = reinterpret_cast<const char*>(pair.side[s].tiles());
    }
    end_ = steps * kLinesPerStep;
  }
  QN_INLINE void stop() { line_ = end_ = 0; }

  QN_INLINE void some() {
    const int64_t until = line_ + lines_ < end_ ? line_ + lines_ : end_;
    for (; line_ < until; ++line_) {
      const int64_t in_step = line_ % kLinesPerStep;
      __builtin_prefetch(
          tiles_[in_step / 16] + line_ / kLinesPerStep * kStepBytes + in_step % 16 * 64, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLinesPerStep = 32;
  const char* tiles_[2] = {};
  int64_t line_ = 0, end_ = 0, lines_ = 0;
};

/// What a thread needs for 32 tokens x a pair; room for an unpacked pair follows it.
struct FoldedStaging {
  alignas(64) int32_t sums[4][16][16];  // [token half * 2 + side][token][row]
  alignas(64) float total[4][16][16];
};

/// Float work of 32 tokens and one block of columns, a token at a time.
template <class Sink>
class FoldedEpilogue {
 public:
  QN_INLINE void start(const FoldedActivations& x, FoldedStaging* staging, int64_t token,
                       int64_t last_token, int64_t block, int64_t blocks) {
    staging_ = staging;
    row_ = 0;
    const int64_t left = last_token - token;
    rows_ = static_cast<int>(left < 32 ? left : 32);
    token_ = token;
    scale_ = x.scale + token * blocks + block;
    scale_stride_ = blocks;
    first_ = block == 0;
    last_ = block + 1 == blocks;
  }

  QN_INLINE bool done() const { return row_ >= rows_; }

  QN_INLINE void token(Sink& sink) {
    const int tile = row_ / 16 * 2, t = row_ % 16;
    const __m512 scale = _mm512_set1_ps(scale_[row_ * scale_stride_]);
    __m512 y[2];
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(staging_->sums[tile + s][t]));
      float* total = staging_->total[tile + s][t];
      y[s] =
          first_ ? _mm512_mul_ps(sum, scale) : _mm512_fmadd_ps(sum, scale, _mm512_load_ps(total));
      if (!last_) _mm512_store_ps(total, y[s]);
    }
    if (last_) sink.row(token_ + row_, y);
    ++row_;
  }

 private:
  FoldedStaging* staging_ = nullptr;
  int row_ = 0, rows_ = 0;
  int64_t token_ = 0;
  const float* scale_ = nullptr;
  int64_t scale_stride_ = 0;
  bool first_ = false, last_ = false;
};

/// One block of columns for 32 tokens (16 when `two` is false) into staging->sums, with side work
/// between. Rows of a tile that has fewer tokens are whatever follows.
template <bool two, class Side>
QN_INLINE void multiply_block(const FoldedRow* x, const int8_t* const* w, int64_t steps,
                              FoldedStaging* staging, Side&& side) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, x[0].codes + s * x[0].step, 64);
    _tile_loadd(6, w[0] + s * kStepBytes, 64);
    _tile_loadd(7, w[1] + s * kStepBytes, 64);
    if constexpr (two) _tile_loadd(5, x[1].codes + s * x[1].step, 64);
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

/// The pairs pair_at(begin), ..., pair_at(end - 1), rows of `cols` columns, times the tokens
/// [first, last) of x; first is a multiple of 32.
template <class PairAt, class Sink>
QN_INLINE void multiply_pairs(const FoldedActivations& x, int64_t cols, int64_t first, int64_t last,
                              int64_t begin, int64_t end, FoldedStaging* staging, PairAt&& pair_at,
                              Sink& sink) {
  const int64_t groups = group_count(cols), steps = folded_cols(cols) / kFoldedTileCols;
  const int64_t blocks = x.blocks(cols), steps_per_block = x.block_cols / kFoldedTileCols;
  const int64_t passes = (last - first + 31) / 32;
  int8_t* unpacked = reinterpret_cast<int8_t*>(staging + 1);
  if (groups % 2 != 0) {  // the last step's second group does not exist
    memset(unpacked + (steps - 1) * kStepBytes, 0, kStepBytes);
  }
  PairPrefetch prefetch;
  for (int64_t p = begin; p < end; ++p) {
    const PanelPair pair = pair_at(p);
    const int8_t* tiles[2];
    __m512 scale[2];
    for (int s = 0; s < 2; ++s) {
      tiles[s] = tiles_of(pair.side[s], groups, unpacked + s * kTileBytes);
      scale[s] = pair.side[s].scale();
    }
    prefetch.stop();
    if (p + 1 < end) prefetch.start(pair_at(p + 1), steps, (32 + passes - 1) / passes);
    sink.start(p, scale);
    FoldedEpilogue<Sink> epilogue;
    for (int64_t token = first; token < last; token += 32) {
      const bool two = last - token > kTokenTile;
      FoldedRow rows[2] = {folded_row(x, cols, token)};
      if (two) rows[1] = folded_row(x, cols, token + kTokenTile);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t step = block * steps_per_block;
        const int64_t block_steps = steps - step < steps_per_block ? steps - step : steps_per_block;
        const int tokens_per_step = static_cast<int>((32 + block_steps - 1) / block_steps);
        const auto side = [&] {
          prefetch.some();
          for (int i = 0; i < tokens_per_step && !epilogue.done(); ++i) epilogue.token(sink);
        };
        if (two) {
          multiply_block<true>(rows, tiles, block_steps, staging, side);
        } else {
          multiply_block<false>(rows, tiles, block_steps, staging, side);
        }
        for (int s = 0; s < 2; ++s) {
          rows[s].codes += block_steps * rows[s].step;
          tiles[s] += block_steps * kStepBytes;
        }
        epilogue.start(x, staging, token, last, block, blocks);
      }
      for (const int8_t*& side : tiles) side -= steps * kStepBytes;
    }
    while (!epilogue.done()) epilogue.token(sink);
  }
}

}  // namespace qn::cpu::QN_ISA
