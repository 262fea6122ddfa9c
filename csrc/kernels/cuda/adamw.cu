// One step of AdamW, g = grad_scale * grad: mean and square move towards g and g^2, and
// master -= rate * (weight_decay * master + mean / c1 / (sqrt(square / c2) + eps)), in float32.
//
//   thread   4 elements
//   bytes    per element: reads 12 and grad's 4 or 2, writes 12, with a bf16 parameter 2 more;
//            about 40 operations, division and square root correctly rounded
//   shared   none
//   roofline 16 bytes per access where the arrays are aligned, whole sectors, nothing twice: the
//            bandwidth of global memory limits it (A100 and H100 alike)
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 4;

struct State {
  float master, mean, square;
};

QN_DEV void step(const AdamwArgs& args, float grad, State& s) {
  const float g = grad * args.grad_scale;
  s.mean = fmaf(s.mean, args.beta1, g * args.rest1);
  s.square = fmaf(s.square, args.beta2, g * g * args.rest2);
  const float move = s.mean / (sqrtf(s.square * args.correction2) + args.eps);
  s.master = fmaf(move, -args.rate, s.master * args.keep);
}

QN_DEV void load_grad(float (&out)[kElements], const float* p) { load(out, p); }
QN_DEV void load_grad(float (&out)[kElements], const bf16* p) {
  const uint2 v = ld8(p);
  out[0] = bf16_lo(v.x), out[1] = bf16_hi(v.x), out[2] = bf16_lo(v.y), out[3] = bf16_hi(v.y);
}

template <typename G>
__global__ __launch_bounds__(kThreads) void adamw_kernel(AdamwArgs args, bool aligned) {
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kElements;
  const G* grad = static_cast<const G*>(args.grad);
  if (aligned && begin + kElements <= args.n) {
    float g[kElements], master[kElements], mean[kElements], square[kElements];
    load_grad(g, grad + begin);
    load(master, args.master + begin);
    load(mean, args.mean + begin);
    load(square, args.square + begin);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      State s{master[i], mean[i], square[i]};
      step(args, g[i], s);
      master[i] = s.master, mean[i] = s.mean, square[i] = s.square;
    }
    store(args.master + begin, master);
    store(args.mean + begin, mean);
    store(args.square + begin, square);
    if (args.parameter != nullptr)
      st8(args.parameter + begin,
          uint2{pack_bf16(master[0], master[1]), pack_bf16(master[2], master[3])});
    return;
  }
  for (int64_t i = begin; i < args.n && i < begin + kElements; ++i) {
    State s{args.master[i], args.mean[i], args.square[i]};
    step(args, load1(grad + i), s);
    args.master[i] = s.master;
    args.mean[i] = s.mean;
    args.square[i] = s.square;
    if (args.parameter != nullptr) store1(args.parameter + i, s.master);
  }
}

template <typename G>
int run(const AdamwArgs& args, cudaStream_t stream) {
  const bool aligned = rows_are_aligned(args.master, 0) && rows_are_aligned(args.mean, 0) &&
                       rows_are_aligned(args.square, 0) && rows_are_aligned(args.parameter, 0) &&
                       rows_are_aligned(static_cast<const G*>(args.grad), 0);
  return launch("adamw", adamw_kernel<G>,
                dim3(static_cast<unsigned>(divide_up(args.n, kThreads * kElements))),
                dim3(kThreads), 0, stream, args, aligned);
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_adamw(const qn::AdamwArgs* args, void* stream) {
  if (args->n == 0) return 0;
  return args->grad_dtype == qn::DType::F32
             ? qn::cuda::run<float>(*args, static_cast<cudaStream_t>(stream))
             : qn::cuda::run<qn::bf16>(*args, static_cast<cudaStream_t>(stream));
}
