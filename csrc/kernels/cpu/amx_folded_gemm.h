// What the folded GEMMs share: int8 tiles of sixteen plus sixteen weight rows, times folded
// activations, with the float work spread between the tile products. Level amx only.
//
//   weight  int8, one scale per row. Int8 panels are tiles as they lie. 4-bit ones are
//           w8 = round(weight / fold_scale), unpacked to [step of 64 columns][side][16][64] before
//           the products: spread between them the unpacking costs three times as much, because its
//           stores delay the tile loads
//   x       int8, one scale per token and block of columns (FoldedActivations)
//   y       sum over the blocks of x scale * int32 sum, given to a Sink, which multiplies by the
//           rows' scales; the float operations are those of gemm_int8.cpp, in the same order
//   order   for pairs that stay in L2: for 32 tokens, whose activations stay in L1: for each pair.
//           So a pair is unpacked once for all tokens, and the results of 32 tokens come together
//
// A Sink takes the two vectors of sixteen sums that a token has with a pair:
//   start_pairs(end)       the pairs up to `end`, where the last ones ended, meet all tokens
//   start_tokens(token)    these pairs meet 32 tokens
//   prepare(pair, begin, end)  results of the pair with these tokens will follow
//   start(pair, scale[2])  before the first of them
//   row(token, y[2])       each token once
//   finish_tokens(begin, end)  all of these pairs have met these tokens
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
/// Steps whose tiles of 32 tokens stay in L1 while pairs pass.
constexpr int64_t kL1Steps = 16;

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

/// Brings tiles of one side to L2 while other tiles are multiplied.
class Prefetch {
 public:
  /// `steps` tiles, kStepBytes apart; `half`: half a tile a call, else a whole one.
  QN_INLINE void start(const int8_t* tiles, int64_t steps, bool half) {
    at_ = reinterpret_cast<const char*>(tiles);
    end_ = at_ + steps * kStepBytes;
    line_ = 0;
    lines_per_call_ = half ? kTileBytes / 128 : kTileBytes / 64;
  }
  QN_INLINE void some() {
    if (at_ == end_) return;
    for (int i = 0; i < lines_per_call_; ++i) __builtin_prefetch(at_ + 64 * (line_ + i), 0, 2);
    line_ += lines_per_call_;
    if (line_ == kTileBytes / 64) {
      line_ = 0;
      at_ += kStepBytes;
    }
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int line_ = 0, lines_per_call_ = 0;
};

/// A pair that stays in L2 while the tokens pass.
struct ResidentPair {
  const int8_t* tiles[2];
  __m512 scale[2];
};

/// What a thread needs beside the unpacked pairs, which follow it.
struct FoldedStaging {
  alignas(64) int32_t sums[2][32][2][16];  // by turns [token][side][row]
  ResidentPair pairs[kFoldedPairs];
  alignas(64) float totals[kFoldedPairs][32][2][16];
};
static_assert(sizeof(FoldedStaging) <= kFoldedStagingBytes, "ops reserve too little");

/// Float work of 32 tokens, a pair and one block of columns, some tokens at a time.
template <class Sink>
class FoldedEpilogue {
 public:
  QN_INLINE void start(const FoldedActivations& x, int64_t token, int64_t end_token, int64_t block,
                       int64_t blocks, const int32_t (*sums)[2][16], float (*total)[2][16]) {
    row_ = 0;
    rows_ = static_cast<int>(end_token - token);
    sums_ = sums;
    token_ = token;
    scale_ = x.scale + token * blocks + block;
    scale_stride_ = blocks;
    total_ = total;
    first_ = block == 0;
    last_ = block + 1 == blocks;
  }

  QN_INLINE void some(Sink& sink, int count) {
    const int end = row_ + count < rows_ ? row_ + count : rows_;
    if (last_) {
      first_ ? rows<true, true>(sink, end) : rows<false, true>(sink, end);
    } else {
      first_ ? rows<true, false>(sink, end) : rows<false, false>(sink, end);
    }
    row_ = end;
  }
  QN_INLINE void rest(Sink& sink) { some(sink, 32); }

 private:
  template <bool first, bool last>
  QN_INLINE void rows(Sink& sink, int end) {
    for (int row = row_; row < end; ++row) {
      const __m512 scale = _mm512_set1_ps(scale_[row * scale_stride_]);
      __m512 y[2];
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums_[row][s]));
        float* total = total_[row][s];
        y[s] =
            first ? _mm512_mul_ps(sum, scale) : _mm512_fmadd_ps(sum, scale, _mm512_load_ps(total));
        if constexpr (!last) _mm512_store_ps(total, y[s]);
      }
      if constexpr (last) sink.row(token_ + row, y);
    }
  }

  int row_ = 0, rows_ = 0;
  int64_t token_ = 0;
  const float* scale_ = nullptr;
  int64_t scale_stride_ = 0;
  const int32_t (*sums_)[2][16] = nullptr;
  float (*total_)[2][16] = nullptr;
  bool first_ = false, last_ = false;
};

/// One block of columns for 32 tokens (16 when `two` is false) into sums, with `side` called 2 *
/// steps (steps) times between. Rows of a tile that has fewer tokens are whatever follows.
///
/// Two sums at a time, so that four tile registers are in use: a core has few beyond the eight
/// that have names, and two hyperthreads share them. Beside a busy neighbour a product takes 65 to
/// 85 ticks with all eight in use, 47 to 67 with six and 35 to 43 with four; alone it takes 18 to
/// 20 in each case. Tiles of weights leave L1 to those of x.
template <bool two, class Side>
QN_INLINE void multiply_block(const FoldedRow* x, const int8_t* const* w, int64_t steps,
                              int32_t (*sums)[2][16], Side&& side) {
  constexpr int kStride = sizeof(sums[0]);
  if constexpr (two) {
    for (int i = 0; i < 2; ++i) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t s = 0; s < steps; ++s) {
        _tile_stream_loadd(6, w[i] + s * kStepBytes, 64);
        _tile_loadd(4, x[0].codes + s * x[0].step, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(4, x[1].codes + s * x[1].step, 64);
        _tile_dpbssd(1, 4, 6);
        side();
      }
      _tile_stored(0, sums[0][i], kStride);
      _tile_stored(1, sums[16][i], kStride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t s = 0; s < steps; ++s) {
      _tile_loadd(4, x[0].codes + s * x[0].step, 64);
      _tile_stream_loadd(6, w[0] + s * kStepBytes, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_stream_loadd(6, w[1] + s * kStepBytes, 64);
      _tile_dpbssd(1, 4, 6);
      side();
    }
    _tile_stored(0, sums[0][0], kStride);
    _tile_stored(1, sums[0][1], kStride);
  }
}

/// The pairs pair_at(begin), ..., pair_at(end - 1), rows of `cols` columns, times the tokens
/// [first, last) of x; first is a multiple of 32. The first `count` pairs are staging->pairs; those
/// behind them are only brought nearer.
template <class PairAt, class Sink>
QN_INLINE void multiply_residents(const FoldedActivations& x, int64_t cols, int64_t first,
                                  int64_t last, int64_t begin, int64_t count, int64_t end,
                                  FoldedStaging* staging, PairAt&& pair_at, Sink& sink) {
  const int64_t steps = folded_cols(cols) / kFoldedTileCols;
  const int64_t blocks = x.blocks(cols), steps_per_block = x.block_cols / kFoldedTileCols;
  const int64_t fitting = kL1Steps / steps_per_block;
  const int64_t blocks_per_pass = steps <= kL1Steps ? blocks : fitting > 1 ? fitting : 1;
  const int64_t pass_steps = blocks_per_pass * steps_per_block;
  const auto clipped = [](int64_t size, int64_t left) { return left < size ? left : size; };
  for (int64_t token = first; token < last; token += 32) {
    const bool two = last - token > kTokenTile;
    const int64_t tokens_end = clipped(token + 32, last);
    Prefetch prefetch[2];
    FoldedEpilogue<Sink> epilogue;
    int turn = 0;
    sink.start_tokens(token);
    for (int64_t pass = 0; pass < blocks; pass += blocks_per_pass) {
      const int64_t pass_end = clipped(pass + blocks_per_pass, blocks);
      for (int64_t p = 0; p < count; ++p) {
        if (token == first) {  // what comes next is not in L2 yet
          const bool stays = p + 1 == count && pass_end < blocks;
          const int64_t pair = stays ? begin : begin + p + 1;
          const int64_t block = stays ? pass_end : p + 1 < count ? pass : 0;
          const int64_t step = block * steps_per_block;
          if (pair < end) {
            const PanelPair next = pair_at(pair);
            for (int s = 0; s < 2; ++s) {
              if (next.side[s].format != WeightFormat::Int8) continue;
              prefetch[s].start(next.side[s].tiles() + step * kStepBytes,
                                clipped(pass_steps, steps - step), two);
            }
          }
        }
        const ResidentPair& pair = staging->pairs[p];
        for (int64_t block = pass; block < pass_end; ++block) {
          const int64_t step = block * steps_per_block;
          const int64_t block_steps = clipped(steps_per_block, steps - step);
          FoldedRow rows[2] = {folded_row(x, cols, token)};
          if (two) rows[1] = folded_row(x, cols, token + kTokenTile);
          for (FoldedRow& row : rows) row.codes += step * row.step;
          const int8_t* tiles[2] = {pair.tiles[0] + step * kStepBytes,
                                    pair.tiles[1] + step * kStepBytes};
          if (block + 1 == blocks) sink.prepare(begin + p, token, tokens_end);
          const int tokens_per_call =
              static_cast<int>((kTokenTile + block_steps - 1) / block_steps);
          const auto side = [&] {
            prefetch[0].some();
            prefetch[1].some();
            epilogue.some(sink, tokens_per_call);
          };
          if (two) {
            multiply_block<true>(rows, tiles, block_steps, staging->sums[turn], side);
          } else {
            multiply_block<false>(rows, tiles, block_steps, staging->sums[turn], side);
          }
          epilogue.start(x, token, tokens_end, block, blocks, staging->sums[turn],
                         staging->totals[blocks_per_pass < blocks ? p : 0]);
          if (block + 1 == blocks) sink.start(begin + p, pair.scale);
          turn = 1 - turn;
        }
      }
    }
    epilogue.rest(sink);
    sink.finish_tokens(token, tokens_end);
  }
}

/// The pairs pair_at(begin), ..., pair_at(end - 1), rows of `cols` columns, times the tokens
/// [first, last) of x; first is a multiple of 32.
template <class PairAt, class Sink>
QN_INLINE void multiply_pairs(const FoldedActivations& x, int64_t cols, int64_t first, int64_t last,
                              int64_t begin, int64_t end, FoldedStaging* staging, PairAt&& pair_at,
                              Sink& sink) {
  const int64_t groups = group_count(cols), steps = folded_cols(cols) / kFoldedTileCols;
  int8_t* const unpacked = reinterpret_cast<int8_t*>(staging) + kFoldedStagingBytes;
  const int64_t residents = folded_residents(cols, last - first);
  const int64_t passes = (end - begin + residents - 1) / residents;
  const int64_t per_pass = (end - begin + passes - 1) / passes;
  for (int64_t p = begin; p < end; p += per_pass) {
    const int64_t count = end - p < per_pass ? end - p : per_pass;
    for (int64_t i = 0; i < count; ++i) {
      const PanelPair pair = pair_at(p + i);
      ResidentPair& resident = staging->pairs[i];
      int8_t* const out = unpacked + i * steps * kStepBytes;
      if (groups % 2 != 0) {  // the last step's second group does not exist
        memset(out + (steps - 1) * kStepBytes, 0, kStepBytes);
      }
      for (int s = 0; s < 2; ++s) {
        resident.tiles[s] = tiles_of(pair.side[s], groups, out + s * kTileBytes);
        resident.scale[s] = pair.side[s].scale();
      }
    }
    sink.start_pairs(p + count);
    multiply_residents(x, cols, first, last, p, count, end, staging, pair_at, sink);
  }
}

}  // namespace qn::cpu::QN_ISA
