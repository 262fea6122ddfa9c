// Device helpers that several kernels share: 16-byte vectors, sums and maxima over lanes.
#pragma once
#include "core/dtype.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/scalar.h"

namespace qn::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

QN_DEV float load1(const float* p) { return *p; }
QN_DEV float load1(const bf16* p) { return to_float(*p); }
QN_DEV void store1(float* p, float value) { *p = value; }
QN_DEV void store1(bf16* p, float value) {
  p->bits = static_cast<uint16_t>(pack_bf16(value, value));
}

QN_DEV void unpack8(float (&out)[8], uint4 v) {
  out[0] = bf16_lo(v.x), out[1] = bf16_hi(v.x), out[2] = bf16_lo(v.y), out[3] = bf16_hi(v.y);
  out[4] = bf16_lo(v.z), out[5] = bf16_hi(v.z), out[6] = bf16_lo(v.w), out[7] = bf16_hi(v.w);
}

QN_DEV uint4 pack8(const float (&v)[8]) {
  return uint4{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
               pack_bf16(v[6], v[7])};
}

/// Elements of T in the 16 bytes that one access moves.
template <class T>
constexpr int kVector = 16 / sizeof(T);

/// load and store move one vector; p is 16-byte aligned.
QN_DEV void load(float (&out)[8], const bf16* p) { unpack8(out, ld16(p)); }
QN_DEV void load(float (&out)[4], const float* p) {
  const uint4 v = ld16(p);
  out[0] = bits_to_float(v.x), out[1] = bits_to_float(v.y), out[2] = bits_to_float(v.z),
  out[3] = bits_to_float(v.w);
}

QN_DEV void store(bf16* p, const float (&v)[8]) { st16(p, pack8(v)); }
QN_DEV void store(float* p, const float (&v)[4]) {
  st16(p, uint4{__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                __float_as_uint(v[3])});
}

/// N elements from `index` on; zeros beyond `cols`.
template <typename T, int N>
QN_DEV void load_some(float (&out)[N], const T* row, int64_t index, int64_t cols, bool aligned) {
  constexpr int kSize = kVector<T>;
  if constexpr (N % kSize == 0) {
    if (aligned && index + N <= cols) {
#pragma unroll
      for (int i = 0; i < N; i += kSize) {
        float v[kSize];
        load(v, row + index + i);
#pragma unroll
        for (int j = 0; j < kSize; ++j) out[i + j] = v[j];
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    out[i] = index + i < cols ? load1(row + index + i) : 0.0f;
  }
}

/// Stores one vector's elements as far as they lie before `cols`.
template <typename T, int N>
QN_DEV void store_some(T* row, int64_t index, int64_t cols, bool aligned, const float (&v)[N]) {
  if (aligned && index + N <= cols) {
    store(row + index, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (index + i < cols) store1(row + index + i, v[i]);
  }
}

/// Eight floats of shared memory. Lanes that read neighbouring eights meet no bank twice, as every
/// other four of them take the upper half first.
QN_DEV void load_neighbour(float (&v)[8], const float* p) {
  const int flip = threadIdx.x / 4 % 2 * 4;
  float first[4], second[4];
  load(first, p + flip);
  load(second, p + 4 - flip);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = flip == 0 ? first[i] : second[i];
    v[i + 4] = flip == 0 ? second[i] : first[i];
  }
}

/// Eight floats as int8, value * inverse to nearest.
QN_DEV uint2 round_to_int8(const float (&v)[8], float inverse) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int code = __float2int_rn(v[i] * inverse);
    words[i / 4] |= (static_cast<uint32_t>(code) & 255u) << (8 * (i % 4));
  }
  return uint2{words[0], words[1]};
}

/// Sum over `Lanes` neighbouring lanes (a power of two), in all of them.
template <int Lanes = kWarp>
QN_DEV float lane_sum(float value) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <int Lanes = kWarp>
QN_DEV float lane_max(float value) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

QN_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Whether rows that start at p, `stride` elements apart, can be read 16 bytes at a time.
template <class T>
inline bool rows_are_aligned(const T* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * sizeof(T) % 16 == 0;
}

}  // namespace qn::cuda
