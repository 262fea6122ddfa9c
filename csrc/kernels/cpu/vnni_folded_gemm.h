// The folded GEMMs (folded_gemm.h) with vpdpbusd: eight tokens times sixteen plus sixteen rows in
// sixteen registers of sums. Level avx512 only.
//
//   order   for pairs that stay in L2, unpacked: for 32 tokens: for each pair. A pair passes L1 once
//           for eight tokens, at 8 bytes for a product
#pragma once
#include "kernels/cpu/folded_gemm.h"

namespace qn::cpu::QN_ISA {

/// What a thread needs beside the unpacked pairs, which follow it.
struct FoldedStaging {
  struct ResidentPair {
    const int8_t* tiles;
    __m512 scale[2];
  };
  ResidentPair pairs[kFoldedPairs];
};
static_assert(sizeof(FoldedStaging) <= kFoldedStagingBytes, "ops reserve too little");

/// The instructions of this level need no setting up.
struct FoldedScope {};

/// A pair of sides as unsigned weights, in tiles.
QN_INLINE void unpack_unsigned(const PanelPair& pair, int64_t cols, int8_t* out) {
  const int64_t steps = folded_cols(cols) / kFoldedTileCols, groups = group_count(cols);
  for (int s = 0; s < 2; ++s) {
    int8_t* const tiles = out + s * kTileBytes;
    if (pair.side[s].format == WeightFormat::Int8) {
      const int8_t* const from = pair.side[s].tiles();
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t i = step * kStepBytes; i < step * kStepBytes + kTileBytes; i += 64) {
          _mm512_store_si512(tiles + i, Codes::load_signed(from + i).v);
        }
      }
    } else {
      unpack(pair.side[s], groups, tiles);
      if (groups % 2 != 0) memset(tiles + (steps - 1) * kStepBytes + 512, 0, 512);
    }
  }
}

/// Brings what one step of a pair is unpacked from nearer.
QN_INLINE void prefetch_step(const PanelPair& pair, int64_t step) {
  for (const HalfPanel& half : pair.side) {
    if (half.format == WeightFormat::Int8) {
      for (int i = 0; i < kTileBytes; i += 64) {
        __builtin_prefetch(half.tiles() + step * kStepBytes + i, 0, 2);
      }
      continue;
    }
    for (int64_t g = 2 * step; g < 2 * step + 2; ++g) {
      const uint8_t* const block = half.packed + sizeof(PanelHeader) + g * kInt4BlockBytes;
      __builtin_prefetch(block, 0, 2);
      for (int i = 0; i < 256; i += 64) {
        __builtin_prefetch(block + kScaleBytes + 256 * half.half + i, 0, 2);
      }
    }
  }
}

/// The results of kCount consecutive tokens of one tile with one pair; `next`, if any, is unpacked
/// afterwards.
template <int kCount, class Sink>
QN_INLINE void multiply_tokens(const FoldedActivations& x, int64_t cols, int64_t token,
                               const int8_t* tiles, const PanelPair* next, Sink& sink) {
  const int64_t steps = folded_cols(cols) / kFoldedTileCols;
  const int64_t blocks = x.blocks(cols), steps_per_block = x.block_cols / kFoldedTileCols;
  const float* const scale = x.scale + token * blocks;
  const int32_t* const negative_sum = x.negative_sum + token * blocks;
  FoldedRow row = folded_row(x, cols, token);
  __m512 y[kCount][2];
  for (int64_t b = 0, step = 0; b < blocks; ++b) {
    GroupSum<8> sums[kCount][2];
    for (int t = 0; t < kCount; ++t) {
      for (GroupSum<8>& sum : sums[t]) sum.start(negative_sum[t * blocks + b]);
    }
    const int64_t end = step + steps_per_block < steps ? step + steps_per_block : steps;
    for (; step < end; ++step, tiles += kStepBytes, row.codes += row.step) {
      if (next != nullptr) prefetch_step(*next, step);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        Codes codes[2];
        for (int s = 0; s < 2; ++s) codes[s].v = _mm512_load_si512(tiles + s * kTileBytes + 64 * i);
#pragma GCC unroll 8
        for (int t = 0; t < kCount; ++t) {
          const int8_t* const four = row.codes + t * kFoldedTileCols + 4 * i;
          for (int s = 0; s < 2; ++s) sums[t][s].add(codes[s], four);
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      const __m512 factor = _mm512_set1_ps(scale[t * blocks + b]);
      for (int s = 0; s < 2; ++s) {
        const __m512 sum = sums[t][s].value().v;
        y[t][s] = b == 0 ? _mm512_mul_ps(sum, factor) : _mm512_fmadd_ps(sum, factor, y[t][s]);
      }
    }
  }
  for (int t = 0; t < kCount; ++t) sink.row(token + t, y[t]);
}

/// Tokens [token, end), eight and fewer at a time.
template <int kCount, class Sink>
QN_INLINE void multiply_all(const FoldedActivations& x, int64_t cols, int64_t token, int64_t end,
                            const int8_t* tiles, const PanelPair* next, Sink& sink) {
  for (; token + kCount <= end; token += kCount) {
    multiply_tokens<kCount>(x, cols, token, tiles, next, sink);
    next = nullptr;
  }
  if constexpr (kCount > 1) {
    if (token < end) multiply_all<kCount / 2>(x, cols, token, end, tiles, next, sink);
  }
}

/// The pairs pair_at(begin), ..., pair_at(end - 1), rows of `cols` columns, times the tokens
/// [first, last) of x; first is a multiple of 32.
template <class PairAt, class Sink>
QN_INLINE void multiply_pairs(const FoldedActivations& x, int64_t cols, int64_t first, int64_t last,
                              int64_t begin, int64_t end, FoldedStaging* staging, PairAt&& pair_at,
                              Sink& sink) {
  const int64_t pair_bytes = kPanelRows * folded_cols(cols);
  int8_t* const unpacked = reinterpret_cast<int8_t*>(staging) + kFoldedStagingBytes;
  const int64_t residents = folded_residents(cols, last - first);
  for (int64_t p = begin, count; p < end; p += count) {
    count = end - p < residents ? end - p : residents;
    for (int64_t i = 0; i < count; ++i) {
      const PanelPair pair = pair_at(p + i);
      int8_t* const tiles = unpacked + i * pair_bytes;
      unpack_unsigned(pair, cols, tiles);
      staging->pairs[i] = {tiles, {pair.side[0].scale(), pair.side[1].scale()}};
    }
    sink.start_pairs(p + count);
    for (int64_t token = first; token < last; token += 32) {
      const int64_t tokens_end = token + 32 < last ? token + 32 : last;
      sink.start_tokens(token);
      const bool unpacks_next = last - first <= 32 && p + 1 < end;  // then count is 1
      const PanelPair next = pair_at(unpacks_next ? p + 1 : p);
      for (int64_t i = 0; i < count; ++i) {
        sink.prepare(p + i, token, tokens_end);
        sink.start(p + i, staging->pairs[i].scale);
        multiply_all<8>(x, cols, token, tokens_end, staging->pairs[i].tiles,
                        unpacks_next ? &next : nullptr, sink);
      }
      sink.finish_tokens(token, tokens_end);
    }
  }
}

}  // namespace qn::cpu::QN_ISA
