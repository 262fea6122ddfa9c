// The folded GEMMs (folded_gemm.h) below AMX. Levels avx2 and avx512.
//
//   order   for pairs that stay near, unpacked: for 32 tokens: for each pair: for the tokens whose
//           sums fit the registers. So a pair is unpacked once for all tokens, and passes L1 once
//           for a few
#pragma once
#include "kernels/cpu/folded_gemm.h"

namespace qn::cpu::QN_ISA {

/// Sums of x over groups of 32 columns, of 32 tokens: [token][step][2].
struct GroupSums {
  int16_t* sums;
  int64_t stride;  // of a token
  int64_t first_token;

  QN_INLINE const int16_t* at(int64_t token, int64_t step) const {
    return sums + (token - first_token) * stride + 2 * step;
  }
};

}  // namespace qn::cpu::QN_ISA

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

/// Tokens [token, end), kCount and fewer at a time; `next`, if any, is unpacked afterwards.
template <int kCount, class Sink>
QN_INLINE void multiply_tokens(const FoldedActivations& x, int64_t cols, int64_t token, int64_t end,
                               const UnpackedPair& pair, const GroupSums& group_sums,
                               const PanelPair* next, Sink& sink) {
  for (; token + kCount <= end; token += kCount) {
    const auto each = [next](int64_t step) {
      if (next != nullptr) prefetch_step(*next, step);
    };
    pair.multiply<kCount>(x, cols, token, group_sums, sink, each);
    next = nullptr;
  }
  if constexpr (kCount > 1) {
    if (token < end) {
      multiply_tokens<kCount / 2>(x, cols, token, end, pair, group_sums, next, sink);
    }
  }
}

#if QN_ISA_LEVEL == 1
inline void add_up_groups(const FoldedActivations& x, int64_t cols, int64_t token, int64_t end,
                          GroupSums& out) {
  const int64_t groups = folded_cols(cols) / kGroupSize;
  out.first_token = token;
  for (; token < end; ++token) {
    const FoldedRow row = folded_row(x, cols, token);
    int16_t* const sums = out.sums + (token - out.first_token) * out.stride;
    for (int64_t g = 0; g < groups; ++g) {
      const int8_t* const codes = row.codes + g / 2 * row.step + g % 2 * kGroupSize;
      const __m256i words = _mm256_maddubs_epi16(
          _mm256_set1_epi8(1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
      const __m256i dwords = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
      __m128i four =
          _mm_add_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
      four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
      four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1));
      sums[g] = static_cast<int16_t>(_mm_cvtsi128_si32(four));
    }
  }
}
#else
QN_INLINE void add_up_groups(const FoldedActivations&, int64_t, int64_t, int64_t, GroupSums&) {}
#endif

/// The pairs pair_at(begin), ..., pair_at(end - 1), rows of `cols` columns, times the tokens
/// [first, last) of x; first is a multiple of 32.
template <class PairAt, class Sink>
QN_INLINE void multiply_pairs(const FoldedActivations& x, int64_t cols, int64_t first, int64_t last,
                              int64_t begin, int64_t end, FoldedStaging* staging, PairAt&& pair_at,
                              Sink& sink) {
  const int64_t pair_bytes = folded_pair_bytes(cols);
  const int64_t residents = folded_residents(cols, last - first);
  char* const unpacked = reinterpret_cast<char*>(staging) + kFoldedStagingBytes;
  GroupSums group_sums{reinterpret_cast<int16_t*>(unpacked + residents * pair_bytes),
                       folded_cols(cols) / kGroupSize, -1};
  for (int64_t p = begin, count; p < end; p += count) {
    count = end - p < residents ? end - p : residents;
    for (int64_t i = 0; i < count; ++i) {
      staging->pairs[i].unpack(pair_at(p + i), cols, unpacked + i * pair_bytes);
    }
    sink.start_pairs(p + count);
    for (int64_t token = first; token < last; token += 32) {
      const int64_t tokens_end = token + 32 < last ? token + 32 : last;
      if (group_sums.first_token != token) add_up_groups(x, cols, token, tokens_end, group_sums);
      sink.start_tokens(token);
      const bool unpacks_next = last - first <= 32 && p + 1 < end;  // then count is 1
      const PanelPair next = pair_at(unpacks_next ? p + 1 : p);
      for (int64_t i = 0; i < count; ++i) {
        sink.prepare(p + i, token, tokens_end);
        sink.start(p + i, staging->pairs[i].scale());
        multiply_tokens<kTokensTogether>(x, cols, token, tokens_end, staging->pairs[i], group_sums,
                                         unpacks_next ? &next : nullptr, sink);
      }
      sink.finish_tokens(token, tokens_end);
    }
  }
}

}  // namespace qn::cpu::QN_ISA
