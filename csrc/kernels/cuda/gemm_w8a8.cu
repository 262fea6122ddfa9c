// GEMM with int8 weights and int8 activations: out = x_scale[token] * scale[row] * (codes of x)
// (codes of W)^T, sums in int32, exact (gemm.cuh has the tile and the pipeline). To the pipeline
// two bytes are one bf16: the fragments of m16n8k32 on bytes are, byte for byte, those of m16n8k16
// on bf16.
//
//   W, x     rows of 128 bytes per stage, 128 columns, swizzled; registers by ldmatrix
//   bytes    a block reads 128 + Tokens per column, 2 * 128 * Tokens operations; up to 16 tokens
//            the weight once and x once per 128 rows
//   roofline up to 16 tokens bound by the bandwidth of global memory, which the weight crosses once
//            as one byte each. From about 200 tokens on as gemm_bf16.cu at twice the rate, with the
//            same 32 multiplications per two bytes from L2: 60 to 80 % of A100's 624 T operations
//            per second, about half of H100's 1979
#include "kernels/cuda/gemm_dense.cuh"

namespace qn::cuda {
namespace {

struct ByteWeight : DenseWeight {
  using Sum = int;
};

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_gemm_w8a8(const qn::cuda::GemmArgs* args, const qn::cuda::DeviceInfo* device,
                                 void* stream) {
  using namespace qn::cuda;
  GemmArgs pairs = *args;
  pairs.cols /= 2;
  pairs.x_stride /= 2;
  pairs.weight_stride /= 2;
  return run_gemm<ByteWeight>("gemm_w8a8", pairs, pick(*args, *device),
                              static_cast<cudaStream_t>(stream));
}
