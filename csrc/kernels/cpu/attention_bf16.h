// What the paths of attention that multiply bf16 share: queries and probabilities rounded to bf16,
// in the order in which they are multiplied, and a softmax in 16-bit fixed point. Levels with
// AVX512_BF16.
#pragma once
#include <immintrin.h>

#include "kernels/cpu/attention_block.h"

namespace qn::cpu::QN_ISA {
namespace {

template <int N>
struct Count {
  static constexpr int value = N;
};

/// Calls fn(first, how many) for kMost of [begin, end) at a time, then for half as many.
template <int kMost, class Fn>
QN_INLINE void in_steps(int begin, int end, const Fn& fn) {
  for (; begin + kMost <= end; begin += kMost) fn(begin, Count<kMost>{});
  if constexpr (kMost > 1) in_steps<kMost / 2>(begin, end, fn);
}

/// Where the keys or values of the block's g-th group are; beyond its end, of the next block's.
const char* ahead(const char* const (Block::*of)[kGroups], const Block& block, const Block& next,
                  int g) {
  if (g < block.groups) return (block.*of)[g];
  if (next.groups == 0) return (block.*of)[block.groups - 1];
  g -= block.groups;
  return (next.*of)[g < next.groups ? g : next.groups - 1];
}

/// m is a whole number, so that rescaling rounds nothing, and stays where a part's first block puts
/// it until a score exceeds it by kHeadroom.
struct Bf16Path {
  static constexpr float kHeadroom = 16;
  static constexpr int kDepth = 32;                            // dims or keys of one multiplication
  static constexpr int kProbStride = kAttentionRows * kDepth;  // [group][row][32 keys]

  /// Probabilities p = 2^(s - m - kHeadroom) of a row's block as bf16, and its sum so far with
  /// them: what is multiplied with the values is what is summed.
  ///
  /// Works in 16-bit fixed point. With y = s - m - kHeadroom and u its fraction less 1/2, four
  /// times the bits of a bf16 p are about 512 (y + 127 + c (u^2 + e u - 1/4)), c = 0.34, the square
  /// correcting 1 + fraction to 2^fraction; `below` is 512 (1/2 - y). The relative error is 1.9e-3
  /// in the mean square and 6e-3 at most, where the nearest bf16 have 1.7e-3 and 4e-3. 0 from about
  /// 2^-126 on down. y > 0, NaN and what is out of the range of int32 give p > 1, which the caller
  /// sees in the sum.
  template <int G>
  static QN_INLINE Vec probs_of(const float* scores, float offset, Vec total, bf16* probs) {
    constexpr int kCorrection = 87, kSkew = 1400;  // 256 c, 65536 e
    const __m512 steps = _mm512_set1_ps(kSteps), start = _mm512_set1_ps(offset);
    const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512i skew = _mm512_set1_epi16(kSkew), correction = _mm512_set1_epi16(kCorrection);
    const __m512i one_and_half =
        _mm512_set1_epi16(static_cast<int16_t>(512 * 127 + 256 + 2 - (kCorrection + 1) / 2));
    const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    const auto below_one = [&](const float* s) {
      return _mm512_cvtps_epi32(_mm512_fnmadd_ps(_mm512_load_ps(s), steps, start));
    };
    for (int g = 0; g < G; ++g, scores += kGroup, probs += kProbStride) {
      const __m512i below = _mm512_permutexvar_epi64(
          in_order, _mm512_packus_epi32(below_one(scores), below_one(scores + Vec::kLanes)));
      const __m512i u = _mm512_slli_epi16(below, 7);
      const __m512i square =
          _mm512_mulhrs_epi16(_mm512_mulhi_epi16(u, _mm512_adds_epi16(u, skew)), correction);
      const __m512i bits =
          _mm512_srli_epi16(_mm512_subs_epu16(one_and_half, _mm512_subs_epu16(below, square)), 2);
      _mm512_store_si512(probs, bits);
      total = _mm512_dpbf16_ps(total.v, reinterpret_cast<__m512bh>(bits), ones);
    }
    return total;
  }

  static QN_INLINE void narrow(Vec low, Vec high, bf16* wide) {
    _mm512_storeu_si512(wide, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
  }

  /// The scales of a block's values and their inverses, 1 for a value of zeros.
  static void load_value_scales(const Block& block, Scratch& s) {
    for (int key = 0; key < block.groups * kGroup; key += Vec::kLanes) {
      const __m512 one = _mm512_set1_ps(1.0f);
      __m512 scale = _mm512_loadu_ps(block.value_scales[key / kGroup] + key % kGroup);
      const __mmask16 zero = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_EQ_OQ);
      scale = _mm512_mask_mov_ps(scale, zero, one);
      _mm512_store_ps(s.value_scales + key, scale);
      _mm512_store_ps(s.inverse_scales + key, _mm512_div_ps(one, scale));
    }
  }

  /// The probabilities of a row's block times the scales of the values, and the sum so far with
  /// them: without the scales, but of what they were rounded to.
  static __attribute__((noinline)) Vec scale_probs(int groups, const Scratch& s, Vec total,
                                                   bf16* probs) {
    const float *scales = s.value_scales, *inverse = s.inverse_scales;
    for (int g = 0; g < groups; ++g, probs += kProbStride) {
      narrow(Vec::load(probs) * Vec::load(scales),
             Vec::load(probs + Vec::kLanes) * Vec::load(scales + Vec::kLanes), probs);
      total = fma(Vec::load(probs), Vec::load(inverse), total);
      total = fma(Vec::load(probs + Vec::kLanes), Vec::load(inverse + Vec::kLanes), total);
      scales += kGroup;
      inverse += kGroup;
    }
    return total;
  }

  /// Packed [head_dim / 32][rows][32]; the last step is filled up with zeros.
  static void load_query(const float* q, Vec scale, int64_t head_dim, int row,
                         const AttentionItem& item, Scratch& s) {
    bf16* packed = reinterpret_cast<bf16*>(s.query) + row * kDepth;
    for (int64_t dim = 0; dim < head_dim; dim += kDepth) {
      bf16* step = packed + dim * item.rows;
      const Vec low = Vec::load(q + dim) * scale;
      const Vec high = dim + 16 < head_dim ? Vec::load(q + dim + 16) * scale : Vec::zero();
      narrow(low, high, step);
    }
  }

 protected:
  static constexpr float kSteps = 512.0f;  // of fixed point

  static QN_INLINE void set_max(Softmax& softmax, int row, float top) {
    softmax.max[row] = __builtin_ceilf(top);
    softmax.offset[row] = kSteps * (softmax.max[row] + kHeadroom + 0.5f);
  }

  /// What most rows need not: masks a row's scores, sets m if the row has none, raises it if asked
  /// to, and limits the scores to what probs_of converts. False if the row sees nothing yet.
  static __attribute__((noinline)) bool prepare_row(const Block& block, Softmax& softmax,
                                                    const Scratch& s, float* scores, int row,
                                                    bool raise) {
    const auto lanes_before = [](int64_t key) {
      return key <= 0 ? 0u : key >= Vec::kLanes ? 0xffffu : (1u << key) - 1u;
    };
    const int count = block.groups * kGroup;
    __m512 top = _mm512_set1_ps(kMinusInfinity);
    __mmask16 is_nan = 0;
    for (int key = 0; key < count; key += Vec::kLanes) {
      const int64_t position = block.first_key + key;
      const auto seen = static_cast<__mmask16>(lanes_before(s.keys_end[row] - position) &
                                               ~lanes_before(s.keys_begin[row] - position));
      const __m512 x = _mm512_mask_load_ps(_mm512_set1_ps(kMinusInfinity), seen, scores + key);
      is_nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      top = _mm512_max_ps(top, x);
      _mm512_store_ps(scores + key, x);
    }
    const float largest = max(Vec(top)), old = softmax.max[row];
    if (is_nan != 0 || largest == -kMinusInfinity) {
      Vec(__builtin_nanf("")).store(softmax.sums + row * Vec::kLanes);
      set_max(softmax, row, 0);
    } else if (old == kMinusInfinity) {
      if (largest == kMinusInfinity) return false;
      set_max(softmax, row, largest);
    } else if (raise && largest > old) {
      raise_max(softmax, row, __builtin_ceilf(largest));
      set_max(softmax, row, softmax.max[row]);
    }
    const Vec least(softmax.max[row] - 128.0f);
    for (int key = 0; key < count; key += Vec::kLanes) {
      max(Vec::load(scores + key), least).store(scores + key);
    }
    return true;
  }

  /// Turns a row's scores of one block into probabilities.
  template <int G>
  static QN_INLINE void softmax_groups(const Block& block, Softmax& softmax, const Scratch& s,
                                       bool int8, float* scores, int row, bf16* probs) {
    if (int8) scale_by_key(block, block.key_scales, scores);
    const auto sees_nothing = [&] {
      for (int g = 0; g < G; ++g) memset(probs + g * kProbStride, 0, kDepth * sizeof(bf16));
    };
    if (!block.visible_to_all) {
      if (!prepare_row(block, softmax, s, scores, row, false)) return sees_nothing();
    } else if (softmax.max[row] == kMinusInfinity) {
      Vec top = Vec::load(scores);
      for (int i = 1; i < 2 * G; ++i) top = max(top, Vec::load(scores + i * Vec::kLanes));
      set_max(softmax, row, max(top));
    }
    float* const sums = softmax.sums + row * Vec::kLanes;
    Vec total = probs_of<G>(scores, softmax.offset[row], Vec::load(sums), probs);
    if (_mm512_cmp_ps_mask(total.v, _mm512_set1_ps(1.0f), _CMP_NLT_UQ) != 0) [[unlikely]] {
      if (!prepare_row(block, softmax, s, scores, row, true)) return sees_nothing();
      total = probs_of<G>(scores, softmax.offset[row], Vec::load(sums), probs);
    }
    if (int8) total = scale_probs(G, s, Vec::load(sums), probs);
    total.store(sums);
  }

  /// The rows of a block, for the softmax of one after the other. kWhole: the block has all groups.
  template <bool kWhole>
  struct Rows {
    const Block& block;
    Softmax& softmax;
    const Scratch& s;
    float* scores;
    bf16* probs;
    int count;
    bool int8;
    int done = 0;

    QN_INLINE void next() {
      if (done == count) return;
      float* const row_scores = scores + done * kScoreStride;
      bf16* const row_probs = probs + done * kDepth;
      if constexpr (kWhole) {
        softmax_groups<kGroups>(block, softmax, s, int8, row_scores, done, row_probs);
      } else if (block.groups == 1) {
        softmax_groups<1>(block, softmax, s, int8, row_scores, done, row_probs);
      } else if (block.groups == 2) {
        softmax_groups<2>(block, softmax, s, int8, row_scores, done, row_probs);
      } else {
        static_assert(kGroups == 4);
        softmax_groups<3>(block, softmax, s, int8, row_scores, done, row_probs);
      }
      ++done;
    }
  };
};

}  // namespace
}  // namespace qn::cpu::QN_ISA
