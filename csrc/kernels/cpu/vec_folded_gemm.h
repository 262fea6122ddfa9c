// The folded GEMMs (folded_gemm.h) below AMX. Levels avx2 and avx512.
//
//   order   for pairs that stay near, unpacked: for 32 tokens: for each pair: for the tokens whose
//           sums fit the registers. So a pair is unpacked once for all tokens, and passes L1 once
//           for a few
#pragma once
#if QN_ISA_LEVEL >= 2
#include "kernels/cpu/vnni_folded_gemm.h"
#else
#include "kernels/cpu/avx2_folded_gemm.h"
#endif

namespace qn::cpu::QN_ISA {

/// What a thread needs beside the unpacked pairs, which follow it.
struct FoldedStaging {
  UnpackedPair pairs[kFoldedPairs];
};
static_assert(sizeof(FoldedStaging) <= kFoldedStagingBytes, "ops reserve too little");

/// The instructions of these levels need no setting up.
struct FoldedScope {};

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

/// The pairs pair_at(begin), ..., pair_at(end - 1), rows of `cols` columns, times the tokens
/// [first, last) of x; first is a multiple of 32.
template <class PairAt, class Sink>
QN_INLINE void multiply_pairs(const FoldedActivations& x, int64_t cols, int64_t first, int64_t last,
                              int64_t begin, int64_t end, FoldedStaging* staging, PairAt&& pair_at,
                              Sink& sink) {
  const int64_t pair_bytes = folded_pair_bytes(cols);
  const int64_t residents = folded_residents(cols, last - first);
  char* const unpacked = reinterpret_cast<char*>(staging) + kFoldedStagingBytes;
  for (int64_t p = begin, count; p < end; p += count) {
    count = end - p < residents ? end - p : residents;
    for (int64_t i = 0; i < count; ++i) {
      staging->pairs[i].unpack(pair_at(p + i), cols, unpacked + i * pair_bytes);
    }
    sink.start_pairs(p + count);
    // With few tokens, what is unpacked next comes nearer meanwhile.
    const bool fetches = last - first <= 32 && p + count < end;
    const PanelPair next = pair_at(fetches ? p + count : p);
    for (int64_t token = first; token < last; token += 32) {
      const int64_t tokens_end = token + 32 < last ? token + 32 : last;
      sink.start_tokens(token);
      for (int64_t i = 0; i < count; ++i) {
        sink.prepare(p + i, token, tokens_end);
        sink.start(p + i, staging->pairs[i].scale());
        staging->pairs[i].multiply(x, cols, token, tokens_end, sink, [&](int64_t step) {
          if (fetches) prefetch_step(next, step);
        });
      }
      sink.finish_tokens(token, tokens_end);
    }
  }
}

}  // namespace qn::cpu::QN_ISA
