// out = x / sqrt(mean(x^2) + eps) * weight; with `residual`: residual += x first (rounded to its
// dtype), then the norm of that sum.
//
//   block     one row: sum of squares (float32), a barrier, then the row again, from L1 or L2
//   bytes     bf16: reads 2 and writes 2 per element and reads the weight; with residual reads 4
//   and
//             writes 4. The second reading of the row comes from the caches: its 2 cols bytes fit.
//   shared    4 bytes per warp
//   roofline  16 bytes per access where rows are aligned; the bandwidth of global memory limits it
#include "kernels/args.h"
#include "kernels/cuda/ptx.cuh"

namespace qn::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

struct Shared {
  float squares[kWarps];
};

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  static QN_DEV void load(float* out, const float* p) {
    const uint4 v = ld16(p);
    out[0] = bits_to_float(v.x), out[1] = bits_to_float(v.y);
    out[2] = bits_to_float(v.z), out[3] = bits_to_float(v.w);
  }
  static QN_DEV void store(float* p, const float (&v)[kSize]) {
    st16(p, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                       __float_as_uint(v[3])));
  }
  static QN_DEV float load_one(const float* p) { return *p; }
  static QN_DEV void store_one(float* p, float v) { *p = v; }
};
template <>
struct Vector<bf16> {
  static constexpr int kSize = 8;
  static QN_DEV void load(float* out, const bf16* p) {
    const uint4 v = ld16(p);
    out[0] = bf16_lo(v.x), out[1] = bf16_hi(v.x), out[2] = bf16_lo(v.y), out[3] = bf16_hi(v.y);
    out[4] = bf16_lo(v.z), out[5] = bf16_hi(v.z), out[6] = bf16_lo(v.w), out[7] = bf16_hi(v.w);
  }
  static QN_DEV void store(bf16* p, const float (&v)[kSize]) {
    st16(p, make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                       pack_bf16(v[6], v[7])));
  }
  static QN_DEV float load_one(const bf16* p) { return to_float(*p); }
  static QN_DEV void store_one(bf16* p, float v) {
    p->bits = static_cast<uint16_t>(pack_bf16(v, 0.0f));
  }
};

/// N elements from `index` on; zeros beyond `cols`.
template <typename T, int N>
QN_DEV void load_some(float (&out)[N], const T* row, int64_t index, int64_t cols, bool aligned) {
  constexpr int kSize = Vector<T>::kSize;
  if constexpr (N % kSize == 0) {
    if (aligned && index + N <= cols) {
#pragma unroll
      for (int i = 0; i < N; i += kSize) Vector<T>::load(out + i, row + index + i);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    out[i] = index + i < cols ? Vector<T>::load_one(row + index + i) : 0.0f;
  }
}

template <typename T, int N>
QN_DEV void store_some(T* row, int64_t index, int64_t cols, bool aligned, const float (&v)[N]) {
  if (aligned && index + N <= cols) {
    Vector<T>::store(row + index, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (index + i < cols) Vector<T>::store_one(row + index + i, v[i]);
  }
}

QN_DEV float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
  return v;
}

template <typename T, typename W>
__global__ __launch_bounds__(kThreads) void rms_norm_kernel(RmsNormArgs args, bool aligned) {
  constexpr int kVector = Vector<T>::kSize;
  Shared& shared = shared_as<Shared>();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  T* out = static_cast<T*>(args.out) + row * args.out_stride;
  const W* weight = static_cast<const W*>(args.weight);
  T* residual = nullptr;
  if (args.residual != nullptr) {
    residual = static_cast<T*>(args.residual) + row * args.residual_stride;
  }
  const int64_t first = threadIdx.x * kVector, step = kThreads * kVector;

  float sum = 0.0f;
  for (int64_t i = first; i < args.cols; i += step) {
    float v[kVector];
    load_some(v, x, i, args.cols, aligned);
    if (residual != nullptr) {
      float r[kVector];
      load_some(r, residual, i, args.cols, aligned);
#pragma unroll
      for (int j = 0; j < kVector; ++j) v[j] += r[j];
      store_some(residual, i, args.cols, aligned, v);
      load_some(v, residual, i, args.cols, aligned);  // as rounded
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum = fmaf(v[j], v[j], sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) shared.squares[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += shared.squares[warp];
  const float scale = rsqrt_approx(total / static_cast<float>(args.cols) + args.eps);

  const T* values = residual != nullptr ? residual : x;
  for (int64_t i = first; i < args.cols; i += step) {
    float v[kVector], w[kVector];
    load_some(v, values, i, args.cols, aligned);
    load_some(w, weight, i, args.cols, aligned);
#pragma unroll
    for (int j = 0; j < kVector; ++j) v[j] = v[j] * scale * w[j];
    store_some(out, i, args.cols, aligned, v);
  }
}

/// Whether vectors may start at every multiple of their size in every row.
template <typename T>
bool rows_are_aligned(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % Vector<T>::kSize == 0;
}

template <typename T, typename W>
int run(const RmsNormArgs& args, int64_t rows, cudaStream_t stream) {
  if (rows == 0 || args.cols == 0) return 0;
  const bool aligned = rows_are_aligned<T>(args.out, args.out_stride) &&
                       rows_are_aligned<T>(args.x, args.x_stride) &&
                       rows_are_aligned<T>(args.residual, args.residual_stride) &&
                       rows_are_aligned<W>(args.weight, 0);
  return launch("rms_norm", rms_norm_kernel<T, W>, dim3(static_cast<unsigned>(rows)),
                dim3(kThreads), sizeof(Shared), stream, args, aligned);
}

}  // namespace
}  // namespace qn::cuda

/// 0, or the error of the launch. dtypes as in RmsNormArgs.
extern "C" [[gnu::visibility("default")]] int qn_cuda_rms_norm(const qn::RmsNormArgs* args,
                                                               int64_t rows, cudaStream_t stream) {
  using namespace qn;
  const bool wide_weight = args->weight_dtype == DType::F32;
  if (args->dtype == DType::F32) {
    return wide_weight ? cuda::run<float, float>(*args, rows, stream)
                       : cuda::run<float, bf16>(*args, rows, stream);
  }
  return wide_weight ? cuda::run<bf16, float>(*args, rows, stream)
                     : cuda::run<bf16, bf16>(*args, rows, stream);
}
