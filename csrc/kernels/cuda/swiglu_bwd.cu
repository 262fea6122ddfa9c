// Gradients of SwiGLU, with s = 1 / (1 + exp(-gate)): dup = dout * gate * s,
// dgate = dout * up * s * (1 + gate * (1 - s)); float32 inside. dgate and dup may be dout, gate or
// up.
//
//   thread   16 bytes of one row of each operand
//   bytes    bf16: reads 6, writes 4 per element, nothing twice; 20 float operations
//   shared   none
//   roofline one access of 16 bytes per operand and thread, whole sectors: nothing but the
//            bandwidth of global memory limits it (A100 and H100 alike)
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/sigmoid.cuh"

namespace qn::cuda {
namespace {

constexpr int kThreads = 256;

struct Gradient {
  float gate, up;
};

QN_DEV Gradient gradient(float dout, float gate, float up) {
  const Sigmoid s = sigmoid(gate);
  return {dout * up * s.value * fmaf(gate, s.rest, 1.0f), dout * (gate * s.value)};
}

template <class T>
__global__ __launch_bounds__(kThreads) void swiglu_bwd_kernel(SwigluBwdArgs args,
                                                              uint32_t vectors_per_row,
                                                              uint32_t vectors, bool aligned) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= vectors) return;
  const int64_t row = index / vectors_per_row;
  const int64_t begin = static_cast<int64_t>(index % vectors_per_row) * kVector<T>;
  const T* dout = static_cast<const T*>(args.dout) + row * args.dout_stride + begin;
  const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride + begin;
  const T* up = static_cast<const T*>(args.up) + row * args.up_stride + begin;
  T* dgate = static_cast<T*>(args.dgate) + row * args.dgate_stride + begin;
  T* dup = static_cast<T*>(args.dup) + row * args.dup_stride + begin;
  const int64_t count = args.inter - begin;
  if (aligned && count >= kVector<T>) {
    float d[kVector<T>], g[kVector<T>], u[kVector<T>];
    load(d, dout);
    load(g, gate);
    load(u, up);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const Gradient result = gradient(d[i], g[i], u[i]);
      g[i] = result.gate, u[i] = result.up;
    }
    store(dgate, g);
    store(dup, u);
  } else {
    for (int i = 0; i < kVector<T> && i < count; ++i) {
      const Gradient result = gradient(load1(dout + i), load1(gate + i), load1(up + i));
      store1(dgate + i, result.gate);
      store1(dup + i, result.up);
    }
  }
}

template <class T>
int run(const SwigluBwdArgs& args, int64_t tokens, cudaStream_t stream) {
  const int64_t vectors_per_row = divide_up(args.inter, kVector<T>);
  const int64_t vectors = vectors_per_row * tokens;
  if (vectors == 0) return 0;
  const bool aligned = rows_are_aligned(static_cast<const T*>(args.dout), args.dout_stride) &&
                       rows_are_aligned(static_cast<const T*>(args.gate), args.gate_stride) &&
                       rows_are_aligned(static_cast<const T*>(args.up), args.up_stride) &&
                       rows_are_aligned(static_cast<const T*>(args.dgate), args.dgate_stride) &&
                       rows_are_aligned(static_cast<const T*>(args.dup), args.dup_stride);
  return launch("swiglu_bwd", swiglu_bwd_kernel<T>, dim3(divide_up(vectors, kThreads)),
                dim3(kThreads), 0, stream, args, static_cast<uint32_t>(vectors_per_row),
                static_cast<uint32_t>(vectors), aligned);
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_swiglu_bwd(const qn::SwigluBwdArgs* args, int64_t tokens, void* stream) {
  if (args->dtype == qn::DType::F32)
    return qn::cuda::run<float>(*args, tokens, static_cast<cudaStream_t>(stream));
  return qn::cuda::run<qn::bf16>(*args, tokens, static_cast<cudaStream_t>(stream));
}
