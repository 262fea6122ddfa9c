// The products of a linear layer's gradients, from matrices as they lie (gemm.cuh has the tile and
// the pipeline): of its input, out = x W with x [tokens, cols], W [cols, rows], and of its weight,
// out = x^T W with x [cols, tokens], W [cols, rows].
//
//   W, x^T   64 lines of 256 bytes per stage, chunks swizzled by line % 8; ldmatrix.trans turns the
//            8x8 matrices, so that nothing is copied twice
//   bytes    a block reads (128 + Tokens) * 2 per column, 2 * 128 * Tokens operations
//   ldmatrix as in gemm_bf16.cu: 6 per 16 mma (64 and 128 tokens)
//   roofline as in gemm_bf16.cu: 80 to 90 % of A100's matrix peak at best, about 60 % of H100's,
//            where there are tiles for all multiprocessors
#include "kernels/cuda/gemm.cuh"

namespace qn::cuda {
namespace {

/// Weights that lie transposed, [cols, rows].
struct TransposedWeight {
  static constexpr bool kGrouped = false, kInputTransposed = false;
  using Sum = float;
  struct Tile {
    bf16 w[kCols][kRows];
  };
  struct Scales {};
  struct Registers {};

  template <int Threads>
  QN_DEV static void fetch(Tile& tile, const GemmArgs& args, int64_t row, int col) {
    copy_columns<kRows, Threads>(tile.w, static_cast<const bf16*>(args.weight), args.weight_stride,
                                 row, args.rows, col * kCols, args.cols);
  }

  QN_DEV static void read(Registers&, const Tile&, int, int) {}

  QN_DEV static void fragments(uint32_t (&b)[kRowTiles][2], const Tile& tile, int warp_row,
                               int lane, int step) {
#pragma unroll
    for (int j = 0; j < kRowTiles; j += 2) {
      const int line = step * 16 + lane % 16, chunk = warp_row / 8 + j + lane / 16;
      uint32_t r[4];
      ldmatrix_x4_trans(r, &tile.w[line][swizzle_row<kRows / 8>(line, chunk) * 8]);
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
  }
};

struct TransposedBoth : TransposedWeight {
  static constexpr bool kInputTransposed = true;
};

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_gemm_input_grad(const qn::cuda::GemmArgs* args,
                                       const qn::cuda::DeviceInfo* device, void* stream) {
  return qn::cuda::run_gemm<qn::cuda::TransposedWeight>("gemm_input_grad", *args, *device,
                                                        static_cast<cudaStream_t>(stream));
}

extern "C" int qn_cuda_gemm_weight_grad(const qn::cuda::GemmArgs* args,
                                        const qn::cuda::DeviceInfo* device, void* stream) {
  return qn::cuda::run_gemm<qn::cuda::TransposedBoth>("gemm_weight_grad", *args, *device,
                                                      static_cast<cudaStream_t>(stream));
}
