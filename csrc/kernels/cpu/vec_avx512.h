// Vec as one zmm register (AVX-512 F/BW/VL/DQ). bf16 conversion is done with integers: the level
// does not have AVX512_BF16, and the result must not depend on whether the host does.
#pragma once
#include <immintrin.h>

namespace qn::cpu::QN_ISA {

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  Vec() = default;
  QN_INLINE Vec(__m512 v_) : v(v_) {}
  QN_INLINE explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
  static QN_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static QN_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static QN_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static QN_INLINE Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static QN_INLINE Vec load(const bf16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static QN_INLINE Vec load(const bf16* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static QN_INLINE Vec load(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  QN_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  QN_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  QN_INLINE void store(bf16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
  }
  QN_INLINE void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }

 private:
  static QN_INLINE __m512 widen(__m256i words) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
  /// Round to nearest even; NaN is made quiet.
  static QN_INLINE __m256i narrow(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
  }
};

/// The even and odd elements of 32, widened.
QN_INLINE void load_pairs(const bf16* p, Vec& even, Vec& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
}

QN_INLINE void load_pairs(const int8_t* p, Vec& even, Vec& odd) {
  const __m512i pairs =
      _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 24), 24));
  odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(pairs, 8));
}

/// The other way round, for numbers that bf16 holds exactly.
QN_INLINE __m512i exact_pairs(Vec even, Vec odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even.v), 16);
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, low, _mm512_castps_si512(odd.v));
}
QN_INLINE void store_exact_pairs(bf16* p, Vec even, Vec odd) {
  _mm512_storeu_si512(p, exact_pairs(even, odd));
}

#if QN_ISA_LEVEL >= 3
/// Thirty-two bf16 as sixteen pairs, one for each lane of a Vec.
struct Pairs {
  static constexpr int kLanes = 32;  // elements
  __m512bh v;

  static QN_INLINE Pairs load(const bf16* p) {
    return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))};
  }
  static QN_INLINE Pairs load(const bf16* p, int n) {
    const auto first = static_cast<__mmask32>((1u << n) - 1u);
    return {reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(first, p))};
  }
  /// To nearest even.
  static QN_INLINE Pairs round(Vec low, Vec high) { return {_mm512_cvtne2ps_pbh(high.v, low.v)}; }
  QN_INLINE void store(bf16* p) const { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(v)); }
};

/// c + both products of each pair; denormals count as zeros.
QN_INLINE Vec fma(Pairs a, Pairs b, Vec c) { return _mm512_dpbf16_ps(c.v, a.v, b.v); }
#endif

QN_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
QN_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
QN_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
QN_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
QN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
QN_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
QN_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
QN_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
QN_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
QN_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v);
}
QN_INLINE bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ) != 0; }
QN_INLINE Vec load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
QN_INLINE void store_half(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

QN_INLINE float sum(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

QN_INLINE float max(Vec a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

/// Minimax polynomial of degree 6 for 2^f, f in [0, 1).
QN_INLINE Vec exp2(Vec a) {
  const __m512 f = _mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(2.161291987e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.2467845143e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6754516938e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5485280778e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022930555e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314704444e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  const __mmask16 normal = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, p, a.v);
}

/// Cody-Waite reduction x = n ln2 + r, then a degree-6 polynomial for e^r (Cephes expf
/// coefficients).
QN_INLINE Vec exp(Vec a) {
  const __m512 x = _mm512_min_ps(_mm512_set1_ps(100.0f), a.v);  // overflows, but not the exponent
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, p, n);
}

/// x / (1 + exp(-x)), by a reciprocal with one step of Newton's method: a zmm division takes as
/// long as all the rest. Where the divisor is infinite the reciprocal is 0.
QN_INLINE Vec silu(Vec x) {
  const __m512 divisor =
      _mm512_add_ps(_mm512_set1_ps(1.0f), exp(Vec(_mm512_sub_ps(_mm512_setzero_ps(), x.v))).v);
  const __m512 estimate = _mm512_rcp14_ps(divisor);
  const __m512 correction = _mm512_fnmadd_ps(divisor, estimate, _mm512_set1_ps(2.0f));
  const __mmask16 finite =
      _mm512_cmp_ps_mask(divisor, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
  return _mm512_mul_ps(x.v, _mm512_maskz_mul_ps(finite, estimate, correction));
}

}  // namespace qn::cpu::QN_ISA
