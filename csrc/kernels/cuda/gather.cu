// out[t] = row ids[t] of an embedding table, as bf16: a copy of bf16 rows, or scale * (code - zero)
// of packed ones (gemm_layout.h), so that a tied output projection and the embedding share their
// bytes. Where the table has no such row, NaN: nobody has checked the ids.
//
//   warp     64 columns of a packed row (lane l: columns 2l and 2l + 1), 256 of a bf16 row
//   bytes    bits / 8 per element read, 2 written, scales once; a packed row's codes of 64 columns
//            are 32 (4 bits) or 64 contiguous bytes, whole sectors
//   shared   none
//   roofline a few rows per step: bound by latency, and by the bandwidth of global memory beyond
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm_layout.h"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr uint32_t kNan = 0x7fff7fffu;  // two of bf16

__global__ __launch_bounds__(kThreads) void gather_bf16_kernel(EmbedArgs args, bool aligned) {
  const int64_t token = blockIdx.x;
  const int64_t begin = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * 8;
  const int64_t row = args.ids[token];
  const bool exists = row >= 0 && row < args.rows;
  const bf16* from = static_cast<const bf16*>(args.table) + row * args.cols + begin;
  bf16* to = static_cast<bf16*>(args.out) + token * args.out_stride + begin;
  const int64_t count = args.cols - begin;
  if (aligned && count >= 8) {
    st16(to, exists ? ld16(from) : uint4{kNan, kNan, kNan, kNan});
  } else {
    for (int i = 0; i < 8 && i < count; ++i)
      to[i] = exists ? from[i] : bf16{static_cast<uint16_t>(kNan)};
  }
}

/// Lane l has the columns 64 tile + 2l and 2l + 1, which are one step s = l / 8, one byte or nibble
/// pair e = l % 8 / 4 and lane l % 4 of the row's four.
template <int Bits>
__global__ __launch_bounds__(kThreads) void gather_packed_kernel(EmbedArgs args) {
  const int lane = threadIdx.x % kWarp;
  const int64_t token = blockIdx.x, id = args.ids[token];
  const bool exists = id >= 0 && id < args.rows;
  const int64_t row = exists ? id : 0;
  const int64_t tile = static_cast<int64_t>(blockIdx.y) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t col = tile * kPackedTile + 2 * lane;
  if (col >= args.cols) return;
  constexpr int kWords = Bits / 2;  // of a lane of an n-tile
  const int64_t tiles = packed_tiles(args.cols);
  const uint32_t* codes = static_cast<const uint32_t*>(args.table) +
                          (row / kPackedTile * tiles + tile) * (packed_tile_bytes(Bits) / 4) +
                          (row % kPackedTile / 8 * kWarp + row % 8 * 4 + lane % 4) * kWords;
  const int step = lane / 8, pair = lane % 8 / 4;
  uint32_t low, high;
  if constexpr (Bits == 4) {
    const uint32_t word = codes[step / 2] >> (4 * (step % 2 * 2 + pair));
    low = word & 15u, high = word >> 16 & 15u;
  } else {
    const uint32_t word = codes[step] >> (16 * pair);
    low = word & 255u, high = word >> 8 & 255u;
  }
  const int64_t index = col / args.group_size * (packed_tiles(args.rows) * kPackedTile) + row;
  const float scale = f16_lo(static_cast<const uint16_t*>(args.scales)[index]);
  const uint32_t zero =
      args.zeros != nullptr ? static_cast<const uint8_t*>(args.zeros)[index] : 1u << (Bits - 1);
  const float offset = static_cast<float>(zero);
  const uint32_t value = exists ? pack_bf16(scale * (static_cast<float>(low) - offset),
                                            scale * (static_cast<float>(high) - offset))
                                : kNan;
  bf16* to = static_cast<bf16*>(args.out) + token * args.out_stride + col;
  if (col + 1 < args.cols && args.out_stride % 2 == 0)
    *reinterpret_cast<uint32_t*>(to) = value;
  else
    for (int i = 0; i < 2 && col + i < args.cols; ++i)
      to[i].bits = static_cast<uint16_t>(value >> 16 * i);
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_gather(const qn::cuda::EmbedArgs* args, void* stream) {
  using namespace qn::cuda;
  if (args->tokens == 0) return 0;
  const dim3 packed_grid(args->tokens, divide_up(args->cols, kPackedTile * (kThreads / kWarp)));
  if (args->bits == 4)
    return launch("gather_int4", gather_packed_kernel<4>, packed_grid, dim3(kThreads), 0,
                  static_cast<cudaStream_t>(stream), *args);
  if (args->bits == 8)
    return launch("gather_int8", gather_packed_kernel<8>, packed_grid, dim3(kThreads), 0,
                  static_cast<cudaStream_t>(stream), *args);
  const qn::bf16 *out = static_cast<const qn::bf16*>(args->out),
                 *table = static_cast<const qn::bf16*>(args->table);
  const bool aligned =
      rows_are_aligned(out, args->out_stride) && rows_are_aligned(table, args->cols);
  return launch("gather_bf16", gather_bf16_kernel,
                dim3(args->tokens, divide_up(args->cols, 8 * kThreads)), dim3(kThreads), 0,
                static_cast<cudaStream_t>(stream), *args, aligned);
}
