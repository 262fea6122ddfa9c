// GEMM with dense bf16 weights (gemm.cuh has the tile and the pipeline).
//
//   W        128 rows x 64 columns per stage as they lie in memory, swizzled like x; B registers
//            by ldmatrix, two n-tiles at a time
//   bytes    a block reads (128 + Tokens) * 2 per column, 2 * 128 * Tokens operations
//   ldmatrix 6 per 16 mma (64 and 128 tokens): 24 shared-memory cycles, 32 tensor-core cycles
//   roofline 128 tokens: 32 multiplications per byte from L2, which at A100's 156 T per second is
//            4.9 TB/s, about what its L2 gives: 80 to 90 % of the peak at best. H100's tensor
//            cores need wgmma for theirs; mma.sync can reach about 60 %. Up to about 100 tokens
//            bound by the bandwidth of global memory, which the weights cross once
#include "kernels/cuda/gemm_dense.cuh"

extern "C" int qn_cuda_gemm_bf16(const qn::cuda::GemmArgs* args, const qn::cuda::DeviceInfo* device,
                                 void* stream) {
  return qn::cuda::run_gemm<qn::cuda::DenseWeight>("gemm_bf16", *args, *device,
                                                   static_cast<cudaStream_t>(stream));
}
