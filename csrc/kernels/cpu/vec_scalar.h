// Vec as an array of sixteen floats: the reference level, plain loops.
#pragma once

namespace qn::cpu::QN_ISA {

struct Vec {
  static constexpr int kLanes = 16;
  float lane[kLanes];

  Vec() = default;
  explicit Vec(float x) {
    for (float& l : lane) l = x;
  }
  static Vec zero() { return Vec(0.0f); }

  static Vec load(const float* p) { return load(p, kLanes); }
  static Vec load(const float* p, int n) {
    Vec v = zero();
    memcpy(v.lane, p, static_cast<size_t>(n) * sizeof(float));  // p may be unaligned: a mapped file
    return v;
  }
  static Vec load(const bf16* p) { return load(p, kLanes); }
  static Vec load(const bf16* p, int n) {
    Vec v = zero();
    bf16 narrow[kLanes];
    memcpy(narrow, p, static_cast<size_t>(n) * sizeof(bf16));
    for (int i = 0; i < n; ++i) v.lane[i] = math::QN_ISA::bf16_to_float(narrow[i]);
    return v;
  }
  static Vec load(const int8_t* p) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = p[i];
    return v;
  }
  void store(float* p) const { store(p, kLanes); }
  void store(float* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = lane[i];
  }
  void store(bf16* p) const { store(p, kLanes); }
  void store(bf16* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = math::QN_ISA::float_to_bf16(lane[i]);
  }
};

/// The even and odd elements of 32, widened.
QN_INLINE void load_pairs(const bf16* p, Vec& even, Vec& odd) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    even.lane[i] = math::QN_ISA::bf16_to_float(p[2 * i]);
    odd.lane[i] = math::QN_ISA::bf16_to_float(p[2 * i + 1]);
  }
}

QN_INLINE void load_pairs(const int8_t* p, Vec& even, Vec& odd) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    even.lane[i] = p[2 * i];
    odd.lane[i] = p[2 * i + 1];
  }
}

/// The other way round, for numbers that bf16 holds exactly.
QN_INLINE void store_exact_pairs(bf16* p, Vec even, Vec odd) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    p[2 * i] = math::QN_ISA::float_to_bf16(even.lane[i]);
    p[2 * i + 1] = math::QN_ISA::float_to_bf16(odd.lane[i]);
  }
}

#define QN_LANEWISE(expression)                                 \
  Vec r;                                                        \
  for (int i = 0; i < Vec::kLanes; ++i) r.lane[i] = expression; \
  return r

QN_INLINE Vec operator+(Vec a, Vec b) { QN_LANEWISE(a.lane[i] + b.lane[i]); }
QN_INLINE Vec operator-(Vec a, Vec b) { QN_LANEWISE(a.lane[i] - b.lane[i]); }
QN_INLINE Vec operator*(Vec a, Vec b) { QN_LANEWISE(a.lane[i] * b.lane[i]); }
QN_INLINE Vec operator/(Vec a, Vec b) { QN_LANEWISE(a.lane[i] / b.lane[i]); }
QN_INLINE Vec fma(Vec a, Vec b, Vec c) { QN_LANEWISE(a.lane[i] * b.lane[i] + c.lane[i]); }
QN_INLINE Vec max(Vec a, Vec b) { QN_LANEWISE(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
QN_INLINE Vec min(Vec a, Vec b) { QN_LANEWISE(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
QN_INLINE Vec sqrt(Vec a) { QN_LANEWISE(sqrtf(a.lane[i])); }
QN_INLINE Vec abs(Vec a) { QN_LANEWISE(fabsf(a.lane[i])); }
QN_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  QN_LANEWISE(a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]);
}
QN_INLINE Vec load_half(const uint16_t* p) { QN_LANEWISE(math::QN_ISA::half_to_float(p[i])); }
QN_INLINE void store_half(uint16_t* p, Vec a) {
  for (int i = 0; i < Vec::kLanes; ++i) p[i] = math::QN_ISA::float_to_half(a.lane[i]);
}
QN_INLINE Vec exp2(Vec a) { QN_LANEWISE(a.lane[i] < -126.0f ? 0.0f : exp2f(a.lane[i])); }
QN_INLINE Vec exp(Vec a) { QN_LANEWISE(expf(a.lane[i])); }
#undef QN_LANEWISE

QN_INLINE bool any_above(Vec a, Vec b) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    if (!(a.lane[i] <= b.lane[i])) return true;
  }
  return false;
}

/// Pairwise over the lanes, in the order that the vector levels use.
QN_INLINE float sum(Vec a) {
  for (int half = Vec::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
  }
  return a.lane[0];
}

QN_INLINE float max(Vec a) {
  float m = a.lane[0];
  for (int i = 1; i < Vec::kLanes; ++i) m = m > a.lane[i] ? m : a.lane[i];
  return m;
}

}  // namespace qn::cpu::QN_ISA
