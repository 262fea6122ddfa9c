// Vec as two ymm registers (AVX2 + FMA + F16C).
#pragma once
#include <immintrin.h>

namespace qn::cpu::QN_ISA {

struct Vec {
  static constexpr int kLanes = 16;
  __m256 lo, hi;

  Vec() = default;
  QN_INLINE Vec(__m256 lo_, __m256 hi_) : lo(lo_), hi(hi_) {}
  QN_INLINE explicit Vec(float x) : lo(_mm256_set1_ps(x)), hi(lo) {}
  static QN_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

  static QN_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static QN_INLINE Vec load(const float* p, int n) {
    if (n == kLanes) return load(p);
    float lanes[kLanes] = {};
    memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
    return load(lanes);
  }
  static QN_INLINE Vec load(const bf16* p) {
    return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static QN_INLINE Vec load(const bf16* p, int n) {
    if (n == kLanes) return load(p);
    bf16 lanes[kLanes] = {};
    memcpy(lanes, p, static_cast<size_t>(n) * sizeof(bf16));
    return load(lanes);
  }
  static QN_INLINE Vec load(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  QN_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  QN_INLINE void store(float* p, int n) const {
    if (n == kLanes) return store(p);
    float lanes[kLanes];
    store(lanes);
    memcpy(p, lanes, static_cast<size_t>(n) * sizeof(float));
  }
  QN_INLINE void store(bf16* p) const {
    const __m256i words = _mm256_packus_epi32(narrow(lo), narrow(hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xD8));
  }
  QN_INLINE void store(bf16* p, int n) const {
    if (n == kLanes) return store(p);
    bf16 lanes[kLanes];
    store(lanes);
    memcpy(p, lanes, static_cast<size_t>(n) * sizeof(bf16));
  }

 private:
  static QN_INLINE __m256 widen(__m128i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  /// Round to nearest even into the low 16 bits of each lane; NaN is made quiet.
  static QN_INLINE __m256i narrow(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, is_nan);
  }
};

/// The even and odd elements of 32, widened.
QN_INLINE void load_pairs(const bf16* p, Vec& even, Vec& odd) {
  const __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  const __m256i upper = _mm256_set1_epi32(-65536);
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(lo, upper)),
         _mm256_castsi256_ps(_mm256_and_si256(hi, upper))};
}

QN_INLINE void load_pairs(const int8_t* p, Vec& even, Vec& odd) {
  const auto widen = [](const int8_t* eight, __m256& low, __m256& high) {
    const __m256i pairs =
        _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(eight)));
    low = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs, 24), 24));
    high = _mm256_cvtepi32_ps(_mm256_srai_epi32(pairs, 8));
  };
  widen(p, even.lo, odd.lo);
  widen(p + 16, even.hi, odd.hi);
}

/// The other way round, for numbers that bf16 holds exactly.
QN_INLINE void store_exact_pairs(bf16* p, Vec even, Vec odd) {
  const auto join = [](bf16* sixteen, __m256 low, __m256 high) {
    const __m256i shifted = _mm256_srli_epi32(_mm256_castps_si256(low), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sixteen),
                        _mm256_blend_epi16(shifted, _mm256_castps_si256(high), 0xAA));
  };
  join(p, even.lo, odd.lo);
  join(p + 16, even.hi, odd.hi);
}

QN_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
QN_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
QN_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
QN_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
QN_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
QN_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
QN_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
QN_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
QN_INLINE Vec abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
QN_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
QN_INLINE bool any_above(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLE_UQ),
                                         _mm256_cmp_ps(a.hi, b.hi, _CMP_NLE_UQ))) != 0;
}
QN_INLINE Vec load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
QN_INLINE void store_half(uint16_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                   _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

QN_INLINE float sum(Vec a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

QN_INLINE float max(Vec a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

/// Minimax polynomial of degree 6 for 2^f, f in [0, 1).
QN_INLINE __m256 exp2_8(__m256 x) {
  const __m256 n = _mm256_floor_ps(x);
  const __m256 f = _mm256_sub_ps(x, n);
  __m256 p = _mm256_set1_ps(2.161291987e-4f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.2467845143e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.6754516938e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5485280778e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4022930555e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9314704444e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  p = _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_LT_OQ), p);
  return _mm256_blendv_ps(p, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

QN_INLINE Vec exp2(Vec a) { return {exp2_8(a.lo), exp2_8(a.hi)}; }

/// Cody-Waite reduction x = n ln2 + r, then a degree-6 polynomial for e^r (Cephes expf
/// coefficients).
QN_INLINE __m256 exp8(__m256 x) {
  const __m256 too_small = _mm256_cmp_ps(x, _mm256_set1_ps(-87.33654f), _CMP_LT_OQ);
  const __m256 too_large = _mm256_cmp_ps(x, _mm256_set1_ps(88.72283f), _CMP_GT_OQ);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0f)));
  // 2^n in two factors, so that n = 128 near the upper end does not overflow the exponent field.
  const __m256i exponent = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(exponent, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  __m256 result =
      _mm256_mul_ps(_mm256_mul_ps(p, power(half)), power(_mm256_sub_epi32(exponent, half)));
  result = _mm256_andnot_ps(too_small, result);
  result = _mm256_blendv_ps(result, _mm256_set1_ps(__builtin_inff()), too_large);
  return _mm256_blendv_ps(result, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

QN_INLINE Vec exp(Vec a) { return {exp8(a.lo), exp8(a.hi)}; }

}  // namespace qn::cpu::QN_ISA
