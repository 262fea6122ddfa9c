// A linear layer with cross-entropy, forward and backward, without ever holding all logits: for
// chunk_tokens tokens at a time
//
//   logits  = hidden W^T                     gemm_bf16.cu, into the workspace, in bf16
//   log_prob, and logits = their gradient    softmax_xent.cu, in place
//   dhidden = logits W                       gemm_grad.cu
//   dweight (+)= logits^T hidden             gemm_grad.cu
//
//   bytes    per chunk: W three times, its logits written twice and read four times, dweight read
//            and written; 6 * vocab * cols operations per token. With 1024 tokens at vocab 152 000
//            a chunk's logits are 311 MB. A softmax over a part of the vocabulary would need every
//            logit a second time, another GEMM
//   roofline that of the GEMMs and softmax_xent one after the other: 6 bytes and 6 * cols
//   operations
//            per logit, so on A100 softmax_xent adds 20 % to their time at 1024 columns, 5 % at
//            4096; on H100, with more operations per byte, half as much again
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {
namespace {

struct Chunk {
  int64_t begin, tokens;
};

/// The chunk's three products; `sums` is what their tiles in parts need.
GemmArgs logits_gemm(const LinearXentArgs& args, Chunk chunk, bf16* logits, float* sums) {
  GemmArgs gemm = {};
  gemm.out = logits;
  gemm.x = static_cast<const bf16*>(args.hidden) + chunk.begin * args.hidden_stride;
  gemm.weight = args.weight;
  gemm.workspace = sums;
  gemm.tokens = chunk.tokens;
  gemm.rows = gemm.out_stride = args.vocab;
  gemm.cols = args.cols;
  gemm.x_stride = args.hidden_stride;
  gemm.weight_stride = args.weight_stride;
  gemm.out_dtype = DType::BF16;
  return gemm;
}

GemmArgs dhidden_gemm(const LinearXentArgs& args, Chunk chunk, const bf16* logits, float* sums) {
  GemmArgs gemm = {};
  gemm.out = static_cast<bf16*>(args.dhidden) + chunk.begin * args.dhidden_stride;
  gemm.x = logits;
  gemm.weight = args.weight;
  gemm.workspace = sums;
  gemm.tokens = chunk.tokens;
  gemm.rows = args.cols;
  gemm.cols = gemm.x_stride = args.vocab;
  gemm.out_stride = args.dhidden_stride;
  gemm.weight_stride = args.weight_stride;
  gemm.out_dtype = DType::BF16;
  return gemm;
}

GemmArgs dweight_gemm(const LinearXentArgs& args, Chunk chunk, const bf16* logits, float* sums) {
  GemmArgs gemm = {};
  gemm.out = args.dweight;
  gemm.x = logits;
  gemm.weight = static_cast<const bf16*>(args.hidden) + chunk.begin * args.hidden_stride;
  gemm.workspace = sums;
  gemm.tokens = gemm.x_stride = args.vocab;
  gemm.rows = args.cols;
  gemm.cols = chunk.tokens;
  gemm.out_stride = args.dweight_stride;
  gemm.weight_stride = args.hidden_stride;
  gemm.out_dtype = args.dweight_dtype;
  gemm.add = chunk.begin > 0;
  return gemm;
}

/// What the tiles in parts of a chunk's products need at most.
int64_t sum_bytes(const LinearXentArgs& args, Chunk chunk, const DeviceInfo& device) {
  if (chunk.tokens == 0) return 0;
  const GemmArgs gemms[] = {logits_gemm(args, chunk, nullptr, nullptr),
                            dhidden_gemm(args, chunk, nullptr, nullptr),
                            dweight_gemm(args, chunk, nullptr, nullptr)};
  int64_t most = 0;
  for (const GemmArgs& gemm : gemms) {
    GemmPlan plan;
    qn_cuda_gemm_plan(&gemm, &device, &plan);
    const int64_t bytes = qn_cuda_gemm_workspace(&plan);
    most = bytes > most ? bytes : most;
  }
  return most;
}

int64_t logit_bytes(const LinearXentArgs& args) {
  const int64_t tokens = args.chunk_tokens < args.tokens ? args.chunk_tokens : args.tokens;
  return divide_up(tokens * args.vocab * static_cast<int64_t>(sizeof(bf16)), 256) * 256;
}

}  // namespace
}  // namespace qn::cuda

extern "C" int64_t qn_cuda_linear_xent_workspace(const qn::cuda::LinearXentArgs* args,
                                                 const qn::cuda::DeviceInfo* device) {
  using namespace qn::cuda;
  // The chunks have chunk_tokens tokens, but for the last one.
  const int64_t full = args->chunk_tokens < args->tokens ? args->chunk_tokens : args->tokens;
  const int64_t whole = sum_bytes(*args, Chunk{0, full}, *device);
  const int64_t last = sum_bytes(*args, Chunk{0, args->tokens % args->chunk_tokens}, *device);
  return logit_bytes(*args) + (whole > last ? whole : last);
}

extern "C" int qn_cuda_linear_xent(const qn::cuda::LinearXentArgs* args,
                                   const qn::cuda::DeviceInfo* device, void* stream) {
  using namespace qn::cuda;
  qn::bf16* logits = static_cast<qn::bf16*>(args->workspace);
  float* sums = reinterpret_cast<float*>(static_cast<char*>(args->workspace) + logit_bytes(*args));
  for (int64_t begin = 0; begin < args->tokens; begin += args->chunk_tokens) {
    const int64_t left = args->tokens - begin;
    const Chunk chunk{begin, left < args->chunk_tokens ? left : args->chunk_tokens};
    const GemmArgs forward = logits_gemm(*args, chunk, logits, sums);
    int error = qn_cuda_gemm_bf16(&forward, device, stream);
    if (error != 0) return error;
    qn::SoftmaxXentArgs softmax = {};
    softmax.log_prob = args->log_prob + begin;
    softmax.logits = logits;
    softmax.targets = args->targets + begin;
    softmax.grad = args->grad != nullptr ? args->grad + begin : nullptr;
    softmax.vocab = softmax.logits_stride = args->vocab;
    softmax.scale = args->scale;
    softmax.dtype = qn::DType::BF16;
    error = qn_cuda_softmax_xent(&softmax, chunk.tokens, stream);
    if (error != 0) return error;
    if (args->grad == nullptr) continue;
    if (args->dhidden != nullptr) {
      const GemmArgs backward = dhidden_gemm(*args, chunk, logits, sums);
      error = qn_cuda_gemm_input_grad(&backward, device, stream);
      if (error != 0) return error;
    }
    if (args->dweight != nullptr) {
      const GemmArgs backward = dweight_gemm(*args, chunk, logits, sums);
      error = qn_cuda_gemm_weight_grad(&backward, device, stream);
      if (error != 0) return error;
    }
  }
  return 0;
}
