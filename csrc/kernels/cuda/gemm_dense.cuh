// A dense weight as it lies, [rows, cols], for the pipeline of gemm.cuh.
#pragma once
#include "kernels/cuda/gemm.cuh"

namespace qn::cuda {

struct DenseWeight {
  static constexpr bool kGrouped = false, kInputTransposed = false;
  using Sum = float;
  struct Tile {
    bf16 w[kRows][kCols];
  };
  struct Scales {};
  struct Registers {};

  template <int Threads>
  QN_DEV static void fetch(Tile& tile, const GemmArgs& args, int64_t row, int col) {
    copy_rows<kRows, Threads>(tile.w, static_cast<const bf16*>(args.weight), args.weight_stride,
                              row, args.rows, col * kCols, args.cols);
  }

  QN_DEV static void read(Registers&, const Tile&, int, int) {}

  QN_DEV static void fragments(uint32_t (&b)[kRowTiles][2], const Tile& tile, int warp_row,
                               int lane, int step) {
#pragma unroll
    for (int j = 0; j < kRowTiles; j += 2) {
      const int row = warp_row + j * 8 + lane % 8 + lane / 16 * 8;
      uint32_t r[4];
      ldmatrix_x4(r, &tile.w[row][swizzle(row, step * 2 + lane / 8 % 2) * 8]);
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
  }
};

}  // namespace qn::cuda
