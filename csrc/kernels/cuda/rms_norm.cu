// out = x / sqrt(mean(x^2) + eps) * weight; with `residual`: residual += x first (rounded to its
// dtype), then the norm of that sum.
//
//   block     one row: sum of squares (float32), a barrier, then the row again, from L1 or L2
//   bytes     bf16: reads 2 and writes 2 per element and reads the weight; with residual reads 4
//   and
//             writes 4. The second reading of the row comes from the caches: its 2 cols bytes fit.
//   shared    4 bytes per warp
//   roofline  16 bytes per access where rows are aligned; the bandwidth of global memory limits it
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

struct Shared {
  float squares[kWarps];
};

template <typename T, typename W>
__global__ __launch_bounds__(kThreads) void rms_norm_kernel(RmsNormArgs args, bool aligned) {
  constexpr int kSize = kVector<T>;
  Shared& shared = shared_as<Shared>();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
  T* out = static_cast<T*>(args.out) + row * args.out_stride;
  const W* weight = static_cast<const W*>(args.weight);
  T* residual = nullptr;
  if (args.residual != nullptr) {
    residual = static_cast<T*>(args.residual) + row * args.residual_stride;
  }
  const int64_t first = threadIdx.x * kSize, step = kThreads * kSize;

  float sum = 0.0f;
  for (int64_t i = first; i < args.cols; i += step) {
    float v[kSize];
    load_some(v, x, i, args.cols, aligned);
    if (residual != nullptr) {
      float r[kSize];
      load_some(r, residual, i, args.cols, aligned);
#pragma unroll
      for (int j = 0; j < kSize; ++j) v[j] += r[j];
      store_some(residual, i, args.cols, aligned, v);
      load_some(v, residual, i, args.cols, aligned);  // as rounded
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum = fmaf(v[j], v[j], sum);
  }
  sum = lane_sum(sum);
  if (threadIdx.x % 32 == 0) shared.squares[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += shared.squares[warp];
  const float scale = rsqrt_approx(total / static_cast<float>(args.cols) + args.eps);

  const T* values = residual != nullptr ? residual : x;
  for (int64_t i = first; i < args.cols; i += step) {
    float v[kSize], w[kSize];
    load_some(v, values, i, args.cols, aligned);
    load_some(w, weight, i, args.cols, aligned);
#pragma unroll
    for (int j = 0; j < kSize; ++j) v[j] = v[j] * scale * w[j];
    store_some(out, i, args.cols, aligned, v);
  }
}

template <typename T, typename W>
int run(const RmsNormArgs& args, int64_t rows, cudaStream_t stream) {
  if (rows == 0 || args.cols == 0) return 0;
  const bool aligned =
      rows_are_aligned(static_cast<const T*>(args.out), args.out_stride) &&
      rows_are_aligned(static_cast<const T*>(args.x), args.x_stride) &&
      rows_are_aligned(static_cast<const T*>(args.residual), args.residual_stride) &&
      rows_are_aligned(static_cast<const W*>(args.weight), 0);
  return launch("rms_norm", rms_norm_kernel<T, W>, dim3(static_cast<unsigned>(rows)),
                dim3(kThreads), sizeof(Shared), stream, args, aligned);
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_rms_norm(const qn::RmsNormArgs* args, int64_t rows, void* stream) {
  using namespace qn;
  const bool wide_weight = args->weight_dtype == DType::F32;
  if (args->dtype == DType::F32) {
    return wide_weight ? cuda::run<float, float>(*args, rows, static_cast<cudaStream_t>(stream))
                       : cuda::run<float, bf16>(*args, rows, static_cast<cudaStream_t>(stream));
  }
  return wide_weight ? cuda::run<bf16, float>(*args, rows, static_cast<cudaStream_t>(stream))
                     : cuda::run<bf16, bf16>(*args, rows, static_cast<cudaStream_t>(stream));
}
