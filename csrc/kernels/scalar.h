// Scalar math shared by the CPU kernels' tails, the scalar level and (as host and device code) the
// CUDA kernels. Everything sits in a namespace named after the ISA level, so that no inline
// function is shared between objects that are compiled with different instruction sets.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "core/dtype.h"

#ifndef QN_ISA
#define QN_ISA base
#endif

#ifdef __CUDACC__
#define QN_HD __host__ __device__
#else
#define QN_HD
#endif

namespace qn::math::QN_ISA {

QN_HD inline float bf16_to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

/// Rounds to nearest, ties to even; NaN stays a (quiet) NaN.
QN_HD inline bf16 float_to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return bf16{static_cast<uint16_t>(bits >> 16)};
}

/// IEEE binary16 to float32, exact, subnormals included.
QN_HD inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    bits = sign | ((magnitude << 13) + 0x38000000u);
  } else {
    const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &subnormal, sizeof bits);
    bits |= sign;
  }
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

/// float32 to IEEE binary16, round to nearest even; overflow gives infinity.
QN_HD inline uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal half: add a constant whose ulp is the half's
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    uint32_t shifted;
    memcpy(&shifted, &magnitude, sizeof shifted);
    return static_cast<uint16_t>(sign | (shifted - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

QN_HD inline float silu(float x) { return x / (1.0f + expf(-x)); }

}  // namespace qn::math::QN_ISA
