// out = gate / (1 + exp(-gate)) * up, computed in float32. Below gate = -87 the result is 0.
//
//   thread   16 bytes of one row of each operand
//   bytes    bf16: reads 4, writes 2 per element, nothing twice; 13 float operations
//   shared   none
//   roofline one access of 16 bytes per operand and thread, whole sectors: nothing but the
//            bandwidth of global memory limits it (A100 and H100 alike)
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/sigmoid.cuh"

namespace qn::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ __launch_bounds__(kThreads) void swiglu_kernel(T* out, const T* gate, const T* up,
                                                          SwigluArgs args, uint32_t vectors_per_row,
                                                          uint32_t vectors, bool aligned) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= vectors) return;
  const int64_t row = index / vectors_per_row;
  const int64_t begin = static_cast<int64_t>(index % vectors_per_row) * kVector<T>;
  gate += row * args.gate_stride + begin;
  up += row * args.up_stride + begin;
  out += row * args.out_stride + begin;
  const int64_t count = args.inter - begin;
  if (aligned && count >= kVector<T>) {
    float a[kVector<T>], b[kVector<T>];
    load(a, gate);
    load(b, up);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) a[i] = silu(a[i]) * b[i];
    store(out, a);
  } else {
    for (int i = 0; i < kVector<T> && i < count; ++i)
      store1(out + i, silu(load1(gate + i)) * load1(up + i));
  }
}

template <class T>
int run(const SwigluArgs& args, int64_t tokens, cudaStream_t stream) {
  const int64_t vectors_per_row = divide_up(args.inter, kVector<T>);
  const int64_t vectors = vectors_per_row * tokens;
  if (vectors == 0) return 0;
  T* out = static_cast<T*>(args.out);
  const T *gate = static_cast<const T*>(args.gate), *up = static_cast<const T*>(args.up);
  const bool aligned = rows_are_aligned(out, args.out_stride) &&
                       rows_are_aligned(gate, args.gate_stride) &&
                       rows_are_aligned(up, args.up_stride);
  return launch("swiglu", swiglu_kernel<T>, dim3(divide_up(vectors, kThreads)), dim3(kThreads), 0,
                stream, out, gate, up, args, static_cast<uint32_t>(vectors_per_row),
                static_cast<uint32_t>(vectors), aligned);
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_swiglu(const qn::SwigluArgs* args, int64_t tokens, void* stream) {
  if (args->dtype == qn::DType::F32)
    return qn::cuda::run<float>(*args, tokens, static_cast<cudaStream_t>(stream));
  return qn::cuda::run<qn::bf16>(*args, tokens, static_cast<cudaStream_t>(stream));
}
