// log_prob[r] = log(softmax(scale * logits[r]))[targets[r]], and with `grad` the logits are
// replaced by grad[r] * scale * (one_hot(targets[r]) - softmax(scale * logits[r])); float32 inside,
// scale > 0. A row without a target (-1) has log_prob 0 and a gradient of zeros; one whose target
// is not in the vocabulary has log_prob NaN.
//
//   block    one row; a thread keeps a running maximum and a sum of powers of two below it; a
//            shuffle tree and shared memory merge them
//   bytes    per logit: reads its size once; with gradient reads it again, from L2 while the rows
//            under way fit (152 000 logits are 300 KB in bf16), and writes it once
//   shared   8 bytes per warp
//   roofline 16 bytes per access where rows are aligned, one exponential per logit and pass: the
//            bandwidth of global memory limits it
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr double kLn2 = 0.693147180559945309417;

/// exp(scale * x) for x <= 0. exp2's argument is rounded; what that and the float factor lose,
/// `rest`, corrects the result.
struct Exponential {
  float high, low;  // of scale * log2(e)
  float lowest;     // below, the result is 0 anyway

  QN_DEV explicit Exponential(float scale) {
    const double factor = scale * 1.44269504088896340736;
    high = static_cast<float>(factor);
    low = static_cast<float>(factor - high);
    lowest = -200.0f / high;
  }
  QN_DEV float operator()(float x) const {
    x = fmaxf(x, lowest);
    const float exponent = x * high, rest = fmaf(x, low, fmaf(x, high, -exponent));
    const float rounded = exp2_approx(exponent);
    return fmaf(rounded, rest * static_cast<float>(kLn2), rounded);
  }
};

/// sum over logits x of exp((x - max) * scale).
struct LogSum {
  float max, sum;
};

struct Shared {
  LogSum warp[kWarps];
};

QN_DEV LogSum merged(LogSum a, LogSum b, const Exponential& exponential) {
  const float max = fmaxf(a.max, b.max);
  const float shift = max == -INFINITY ? 0.0f : max;  // both are empty
  return LogSum{max, a.sum * exponential(a.max - shift) + b.sum * exponential(b.max - shift)};
}

template <typename T>
__global__ __launch_bounds__(kThreads) void softmax_xent_kernel(SoftmaxXentArgs args,
                                                                bool aligned) {
  constexpr int kSize = kVector<T>;
  Shared& shared = shared_as<Shared>();
  const int64_t row = blockIdx.x, vocab = args.vocab;
  T* logits = static_cast<T*>(args.logits) + row * args.logits_stride;
  const int target = args.targets[row];
  const int64_t whole = aligned ? vocab / kSize * kSize : 0;  // elements in vectors
  if (target < 0) {
    if (threadIdx.x == 0) args.log_prob[row] = 0.0f;
    if (args.grad == nullptr) return;
    const float zeros[kSize] = {};
    for (int64_t i = threadIdx.x * kSize; i < whole; i += kThreads * kSize)
      store(logits + i, zeros);
    for (int64_t i = whole + threadIdx.x; i < vocab; i += kThreads) store1(logits + i, 0.0f);
    return;
  }

  const Exponential exponential(args.scale);
  LogSum mine{-INFINITY, 0.0f};
  for (int64_t i = threadIdx.x * kSize; i < whole; i += kThreads * kSize) {
    float v[kSize];
    load(v, logits + i);
    LogSum some{-INFINITY, 0.0f};
#pragma unroll
    for (int j = 0; j < kSize; ++j) some.max = fmaxf(some.max, v[j]);
    const float shift = some.max == -INFINITY ? 0.0f : some.max;
#pragma unroll
    for (int j = 0; j < kSize; ++j) some.sum += exponential(v[j] - shift);
    mine = merged(mine, some, exponential);
  }
  for (int64_t i = whole + threadIdx.x; i < vocab; i += kThreads)
    mine = merged(mine, LogSum{load1(logits + i), 1.0f}, exponential);
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    mine = merged(mine,
                  LogSum{__shfl_xor_sync(kAllLanes, mine.max, lanes),
                         __shfl_xor_sync(kAllLanes, mine.sum, lanes)},
                  exponential);
  if (threadIdx.x % kWarp == 0) shared.warp[threadIdx.x / kWarp] = mine;
  const float chosen = target < vocab ? load1(logits + target) : NAN;
  __syncthreads();
  LogSum all = shared.warp[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) all = merged(all, shared.warp[warp], exponential);
  if (threadIdx.x == 0) {
    // Two large numbers may cancel here, hence double; the logarithm of the mantissa alone is exact
    // to 2^-22.
    const uint32_t bits = __float_as_uint(all.sum);
    const float mantissa = bits_to_float((bits & 0x7fffffu) | 0x3f800000u);
    const double log2_sum =
        static_cast<int>(bits >> 23) - 127 + static_cast<double>(log2_approx(mantissa));
    args.log_prob[row] =
        static_cast<float>(static_cast<double>(chosen - all.max) * args.scale - log2_sum * kLn2);
  }
  if (args.grad == nullptr) return;

  const float grad = args.grad[row], share = -grad * args.scale / all.sum;
  // 1 - probability may cancel, and is the row's largest: one rounding, from double.
  const float at_target = static_cast<float>(
      (1.0 - static_cast<double>(exponential(chosen - all.max)) / all.sum) * grad * args.scale);
  const auto gradient = [&](float logit, int64_t id) {
    return id == target ? at_target : exponential(logit - all.max) * share;
  };
  for (int64_t i = threadIdx.x * kSize; i < whole; i += kThreads * kSize) {
    float v[kSize];
    load(v, logits + i);
#pragma unroll
    for (int j = 0; j < kSize; ++j) v[j] = gradient(v[j], i + j);
    store(logits + i, v);
  }
  for (int64_t i = whole + threadIdx.x; i < vocab; i += kThreads)
    store1(logits + i, gradient(load1(logits + i), i));
}

template <typename T>
int run(const SoftmaxXentArgs& args, int64_t rows, void* stream) {
  if (rows == 0) return 0;
  const bool aligned = rows_are_aligned(static_cast<const T*>(args.logits), args.logits_stride);
  return launch("softmax_xent", softmax_xent_kernel<T>, dim3(rows), dim3(kThreads), sizeof(Shared),
                static_cast<cudaStream_t>(stream), args, aligned);
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_softmax_xent(const qn::SoftmaxXentArgs* args, int64_t rows, void* stream) {
  if (args->dtype == qn::DType::F32) return qn::cuda::run<float>(*args, rows, stream);
  return qn::cuda::run<qn::bf16>(*args, rows, stream);
}
