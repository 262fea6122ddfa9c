// The folded GEMMs (folded_gemm.h) on tiles, with the float work spread between the tile products.
// Level amx only.
//
//   weight  4-bit ones are unpacked before the products for many tokens, for up to 32
//           (multiply_few) two steps ahead of them
//   order   for pairs that stay in L2: for 32 tokens, whose activations stay in L1: for each pair.
//           So a pair is unpacked once for all tokens, and the results of 32 tokens come together
#pragma once
#include "kernels/cpu/amx_tile.h"
#include "kernels/cpu/folded_weights.h"

namespace qn::cpu::QN_ISA {

using FoldedScope = TileScope;

/// Steps whose tiles of 32 tokens stay in L1 while pairs pass.
constexpr int64_t kL1Steps = 16;

/// Where the tiles of one side are; 4-bit ones are unpacked to `out`.
QN_INLINE const int8_t* tiles_of(const HalfPanel& half, int64_t groups, int8_t* out) {
  if (half.format == WeightFormat::Int8) return half.tiles();
  unpack_int4_tiles(half, groups, out);
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
  Vec scale[2];
};

using FoldedTotals = float[32][2][16];  // [token][side][row]

/// Steps in the ring of multiply_few.
constexpr int64_t kRingSteps = 4;

/// What a thread needs beside the unpacked pairs, which follow it.
struct FoldedStaging {
  struct Few {
    FoldedTotals totals;
    int8_t ring[kRingSteps * kStepBytes];
  };
  alignas(64) int32_t sums[2][32][2][16];  // by turns [token][side][row]
  ResidentPair pairs[kFoldedPairs];
  union alignas(64) {
    FoldedTotals totals[kFoldedPairs];
    Few few;
  };
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
      Vec y[2];
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums_[row][s]));
        float* total = total_[row][s];
        y[s] =
            first ? _mm512_mul_ps(sum, scale) : _mm512_fmadd_ps(sum, scale, _mm512_load_ps(total));
        if constexpr (!last) y[s].store(total);
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

/// One block of columns for 32 tokens (16 when `two` is false) into sums, with `fetch` and `finish`
/// called 2 * steps (steps) times between. Rows of a tile that has fewer tokens are whatever
/// follows.
///
/// Two sums at a time, so that four tile registers are in use: a core has few beyond the eight
/// that have names, and two hyperthreads share them. Beside a busy neighbour a product takes 65 to
/// 85 ticks with all eight in use, 47 to 67 with six and 35 to 43 with four; alone it takes 18 to
/// 20 in each case. An instruction that waits for a register holds up all behind it, so other work
/// goes between a load and its product. Tiles of weights leave L1 to those of x.
template <bool two, class Fetch, class Finish>
QN_INLINE void multiply_block(const FoldedRow* x, const int8_t* const* w, int64_t steps,
                              int32_t (*sums)[2][16], Fetch&& fetch, Finish&& finish) {
  constexpr int kStride = sizeof(sums[0]);
  if constexpr (two) {
    for (int i = 0; i < 2; ++i) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t s = 0; s < steps; ++s) {
        _tile_stream_loadd(6, w[i] + s * kStepBytes, 64);
        _tile_loadd(4, x[0].codes + s * x[0].step, 64);
        fetch();
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(4, x[1].codes + s * x[1].step, 64);
        finish();
        _tile_dpbssd(1, 4, 6);
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
      fetch();
      _tile_dpbssd(0, 4, 6);
      _tile_stream_loadd(6, w[1] + s * kStepBytes, 64);
      finish();
      _tile_dpbssd(1, 4, 6);
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
          const auto fetch = [&] {
            prefetch[0].some();
            prefetch[1].some();
          };
          const auto finish = [&] { epilogue.some(sink, tokens_per_call); };
          if (two) {
            multiply_block<true>(rows, tiles, block_steps, staging->sums[turn], fetch, finish);
          } else {
            multiply_block<false>(rows, tiles, block_steps, staging->sums[turn], fetch, finish);
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

/// The tiles of the Int4 pairs pair_at(begin), ..., pair_at(end - 1), unpacked one after the other
/// into a ring of steps, a quarter of a step at a time.
template <class PairAt>
class UnpackedSteps {
 public:
  QN_INLINE UnpackedSteps(const PairAt& pair_at, int64_t begin, int64_t end, int64_t cols,
                          int8_t* ring)
      : pair_at_(pair_at),
        pair_(begin),
        end_(end),
        groups_(group_count(cols)),
        ring_(ring),
        out_(ring) {}

  QN_INLINE void quarter(int number) {
    if (pair_ == end_) return;
    if (group_ == 0 && number == 0) {
      const PanelPair pair = pair_at_(pair_);
      for (int s = 0; s < 2; ++s) side_[s] = Int4Half(pair.side[s]);
    }
    const int s = number % 2, second = number / 2;
    int8_t* out = out_ + s * kTileBytes + second * 512;
    if (group_ + second < groups_) {
      side_[s].next(out);
    } else {
      memset(out, 0, 512);
    }
    if (number < 3) return;
    out_ = out_ == ring_ + (kRingSteps - 1) * kStepBytes ? ring_ : out_ + kStepBytes;
    group_ += 2;
    if (group_ < groups_) return;
    group_ = 0;
    ++pair_;
  }

 private:
  const PairAt& pair_at_;
  int64_t pair_, end_, groups_, group_ = 0;
  int8_t *ring_, *out_;
  Int4Half side_[2];
};

/// multiply_pairs for Int4 pairs and up to 32 tokens, 16 unless `two`. A pair serves them once, so
/// unpacking is what takes the time. It goes on between the tile instructions, which would hold up
/// everything behind them if they followed one another (see multiply_block), two steps ahead, so
/// that its stores are in L1 when the tiles are loaded.
template <bool two, class PairAt, class Sink>
QN_INLINE void multiply_few(const FoldedActivations& x, int64_t cols, int64_t first, int64_t last,
                            int64_t begin, int64_t end, FoldedStaging* staging, PairAt&& pair_at,
                            Sink& sink) {
  constexpr int64_t kAhead = 2;
  constexpr int kStride = sizeof(staging->sums[0][0]);
  const int64_t steps = folded_cols(cols) / kFoldedTileCols;
  const int64_t blocks = x.blocks(cols), steps_per_block = x.block_cols / kFoldedTileCols;
  int8_t* const ring = staging->few.ring;
  UnpackedSteps unpacked(pair_at, begin, end, cols, ring);
  for (int64_t i = 0; i < 4 * kAhead; ++i) unpacked.quarter(static_cast<int>(i % 4));

  FoldedEpilogue<Sink> epilogue;
  int turn = 0;
  int64_t at = 0;
  sink.start_pairs(end);
  sink.start_tokens(first);
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t step = block * steps_per_block;
      const int64_t block_end = step + steps_per_block < steps ? step + steps_per_block : steps;
      if (block + 1 == blocks) sink.prepare(p, first, last);
      const FoldedRow row = folded_row(x, cols, first);
      const FoldedRow next_row = two ? folded_row(x, cols, first + kTokenTile) : row;
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (two) {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t s = step; s < block_end; ++s) {
        const int8_t* w = ring + at % kRingSteps * kStepBytes;
        ++at;
        _tile_loadd(4, row.codes + s * row.step, 64);
        _tile_loadd(6, w, 64);
        unpacked.quarter(0);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(6, w + kTileBytes, 64);
        unpacked.quarter(1);
        _tile_dpbssd(1, 4, 6);
        if constexpr (two) _tile_loadd(4, next_row.codes + s * next_row.step, 64);
        unpacked.quarter(2);
        if constexpr (two) {
          _tile_dpbssd(3, 4, 6);
          _tile_loadd(6, w, 64);
        }
        unpacked.quarter(3);
        if constexpr (two) _tile_dpbssd(2, 4, 6);
        if (s == step) epilogue.rest(sink);
      }
      auto& sums = staging->sums[turn];
      turn = 1 - turn;
      _tile_stored(0, sums[0][0], kStride);
      _tile_stored(1, sums[0][1], kStride);
      if constexpr (two) {
        _tile_stored(2, sums[16][0], kStride);
        _tile_stored(3, sums[16][1], kStride);
      }
      epilogue.start(x, first, last, block, blocks, sums, staging->few.totals);
      if (block + 1 == blocks) {
        const PanelPair pair = pair_at(p);
        const Vec scale[2] = {scale_of(pair.side[0]), scale_of(pair.side[1])};
        sink.start(p, scale);
      }
    }
  }
  epilogue.rest(sink);
  sink.finish_tokens(first, last);
}

/// The pairs pair_at(begin), ..., pair_at(end - 1), rows of `cols` columns, times the tokens
/// [first, last) of x; first is a multiple of 32.
template <class PairAt, class Sink>
QN_INLINE void multiply_pairs(const FoldedActivations& x, int64_t cols, int64_t first, int64_t last,
                              int64_t begin, int64_t end, FoldedStaging* staging, PairAt&& pair_at,
                              Sink& sink) {
  const int64_t groups = group_count(cols), steps = folded_cols(cols) / kFoldedTileCols;
  int8_t* const unpacked = reinterpret_cast<int8_t*>(staging) + kFoldedStagingBytes;
  if (last - first <= 2 * kTokenTile && begin < end) {
    const PanelPair pair = pair_at(begin);
    if (pair.side[0].format == WeightFormat::Int4 && pair.side[1].format == WeightFormat::Int4) {
      if (last - first > kTokenTile) {
        return multiply_few<true>(x, cols, first, last, begin, end, staging, pair_at, sink);
      }
      return multiply_few<false>(x, cols, first, last, begin, end, staging, pair_at, sink);
    }
  }
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
        resident.scale[s] = scale_of(pair.side[s]);
      }
    }
    sink.start_pairs(p + count);
    multiply_residents(x, cols, first, last, p, count, end, staging, pair_at, sink);
  }
}

}  // namespace qn::cpu::QN_ISA
