// GEMM with 8-bit weights and bf16 activations (gemm.cuh has the tile and the pipeline,
// gemm_layout.h the packed weight).
//
//   W        two packed tiles of 4 KB per stage; a lane's codes of 64 columns and 32 rows are four
//            16-byte loads. A byte becomes a float by one prmt (code | 0x4b000000 = 2^23 + code)
//            and one subtraction, and the upper halves of two floats, by one prmt more, a bf16
//            pair; all exact
//   bytes    a block reads 128 + 2 * Tokens per column, plus 2 bytes per row and group; a batch of
//            up to 16 tokens reads the weight once and x once per 128 rows (1.6 %)
//   roofline up to 16 tokens: 10 instructions of a lane per 4 bytes, so bound by memory as the
//            4-bit weights are, with 97 % of its bandwidth left; from about 100 tokens on by the
//            tensor cores, as in gemm_bf16.cu
#include "kernels/cuda/gemm.cuh"

namespace qn::cuda {
namespace {

struct Int8Weight {
  static constexpr bool kGrouped = true, kInputTransposed = false;
  using Sum = float;
  struct Tile {
    uint32_t codes[2 * kPackedTile / 8][kWarp][4];
  };
  using Scales = GroupScales;
  struct Registers {
    uint4 codes[kRowTiles];
  };

  template <int Threads>
  QN_DEV static void fetch(Tile& tile, const GemmArgs& args, int64_t row, int col) {
    fetch_codes<8, Threads>(&tile, args, row, col);
  }

  QN_DEV static void read(Registers& registers, const Tile& tile, int warp_row, int lane) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
      registers.codes[j] = ld16(&tile.codes[warp_row / 8 + j][lane][0]);
  }

  /// code - 128 of byte `index`.
  QN_DEV static uint32_t widen(uint32_t codes, int index) {
    return __float_as_uint(bits_to_float(byte_permute(codes, 0x4b000000u, 0x7440 + index)) -
                           8388736.0f);
  }

  QN_DEV static void fragments(uint32_t (&b)[kRowTiles][2], const Registers& registers,
                               const Scales&, int, int, int, int step) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      const uint4 all = registers.codes[j];
      const uint32_t codes = step == 0 ? all.x : step == 1 ? all.y : step == 2 ? all.z : all.w;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        b[j][e] = byte_permute(widen(codes, 2 * e), widen(codes, 2 * e + 1), 0x7632);
    }
  }
};

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_gemm_int8(const qn::cuda::GemmArgs* args, const qn::cuda::DeviceInfo* device,
                                 void* stream) {
  return qn::cuda::run_gemm<qn::cuda::Int8Weight>("gemm_int8", *args, *device,
                                                  static_cast<cudaStream_t>(stream));
}
