// GEMM with 4-bit weights and bf16 activations (gemm.cuh has the tile and the pipeline,
// gemm_layout.h the packed weight).
//
//   W        two packed tiles of 2 KB per stage; a lane's codes of 64 columns and 32 rows are four
//            8-byte loads. Two nibbles become a bf16 pair by one lop3 (code | 0x4300 = 128 + code)
//            and one fma (- 128 - zero), both exact
//   bytes    a block reads 64 + 2 * Tokens per column, plus 4 bytes per row and group for scales
//            and zeros; a batch of up to 16 tokens reads the weight once and x once per 128 rows
//            (3 %)
//   roofline up to 16 tokens: 11 instructions of a lane per 4 bytes, a quarter of what A100 and a
//            third of what H100 can issue at full bandwidth (10 and 15 bytes per cycle and
//            multiprocessor); one token's counted traffic leaves 95 % of it. From about 64 tokens
//            on tensor cores are the limit, as in gemm_bf16.cu
#include "kernels/cuda/gemm.cuh"

namespace qn::cuda {
namespace {

template <bool Zeros>
struct Int4Weight {
  static constexpr bool kGrouped = true, kInputTransposed = false;
  using Sum = float;
  struct Tile {
    uint32_t codes[2 * kPackedTile / 8][kWarp][2];
  };
  using Scales = GroupScales;
  struct Registers {
    uint2 codes[kRowTiles];
  };

  template <int Threads>
  QN_DEV static void fetch(Tile& tile, const GemmArgs& args, int64_t row, int col) {
    fetch_codes<4, Threads>(&tile, args, row, col);
  }

  QN_DEV static void read(Registers& registers, const Tile& tile, int warp_row, int lane) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
      registers.codes[j] = ld8(&tile.codes[warp_row / 8 + j][lane][0]);
  }

  QN_DEV static void fragments(uint32_t (&b)[kRowTiles][2], const Registers& registers,
                               const Scales& scales, int half, int warp_row, int lane, int step) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      uint32_t offset = 0xc308c308u;  // -136, twice
      if constexpr (Zeros) {
        const uint32_t zero = scales.zero[half][warp_row + j * 8 + lane / 4];
        offset = (0xc300u | zero) * 0x10001u;  // -(128 + zero)
      }
      const uint32_t codes = step < 2 ? registers.codes[j].x : registers.codes[j].y;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t biased = and_or(codes >> (4 * (step % 2 * 2 + e)), 0x000f000fu, 0x43004300u);
        b[j][e] = bf16x2_fma(biased, 0x3f803f80u, offset);  // * 1
      }
    }
  }
};

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_gemm_int4(const qn::cuda::GemmArgs* args, const qn::cuda::DeviceInfo* device,
                                 void* stream) {
  using namespace qn::cuda;
  if (args->zeros != nullptr)
    return run_gemm<Int4Weight<true>>("gemm_int4", *args, *device,
                                      static_cast<cudaStream_t>(stream));
  return run_gemm<Int4Weight<false>>("gemm_int4", *args, *device,
                                     static_cast<cudaStream_t>(stream));
}
