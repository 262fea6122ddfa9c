// Activations as int8 for gemm_w8a8.cu: codes = round(x / scale), scale = max |x| of a token / 127.
// A token of zeros has scale 0.
//
//   block    one token: its maximum, a barrier, then the row again, from L1 or L2
//   bytes    reads 2 and writes 1 per element, 4 per token; 4 operations
//   shared   4 bytes per warp
//   roofline 16 bytes per access, whole sectors: the bandwidth of global memory limits it
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;

struct Shared {
  float largest[kWarps];
};

__global__ __launch_bounds__(kThreads) void quantize_tokens_kernel(QuantizeTokensArgs args) {
  Shared& shared = shared_as<Shared>();
  const int64_t token = blockIdx.x;
  const bf16* x = static_cast<const bf16*>(args.x) + token * args.x_stride;
  int8_t* codes = args.codes + token * args.codes_stride;
  float largest = 0.0f;
  for (int64_t i = threadIdx.x * 8; i < args.cols; i += kThreads * 8) {
    float v[8];
    load(v, x + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(v[j]));
  }
  largest = lane_max(largest);
  if (threadIdx.x % kWarp == 0) shared.largest[threadIdx.x / kWarp] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, shared.largest[i]);
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (int64_t i = threadIdx.x * 8; i < args.cols; i += kThreads * 8) {
    float v[8];
    load(v, x + i);
    st8(codes + i, round_to_int8(v, inverse));
  }
  if (threadIdx.x == 0) args.scales[token] = largest / 127.0f;
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_quantize_tokens(const qn::cuda::QuantizeTokensArgs* args, void* stream) {
  using namespace qn::cuda;
  if (args->tokens == 0) return 0;
  return launch("quantize_tokens", quantize_tokens_kernel,
                dim3(static_cast<unsigned>(args->tokens)), dim3(kThreads), sizeof(Shared),
                static_cast<cudaStream_t>(stream), *args);
}
