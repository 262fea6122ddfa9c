// How the GEMMs are launched, and the sum over the parts of tiles that several blocks share.
//
//   merge    one block per shared tile, a thread has eight neighbouring rows of W of every eighth
//            token
//   bytes    reads 4 per part and result and writes the result; at most one part per block more
//            than there are tiles, so 1 KB of a batch-1 GEMV's 4 KB per unit and block is an upper
//            bound
//   shared   none
//   roofline a few megabytes that the L2 cache still holds: bound by its bandwidth
#include "kernels/cuda/gemm.cuh"

namespace qn::cuda {
namespace {

constexpr int kMergeThreads = kRows / 8 * 8;

/// Sums the parts of one tile in ascending order of their columns; eight tokens at a time.
__global__ __launch_bounds__(kMergeThreads, 8) void gemm_merge_kernel(GemmArgs args,
                                                                      GemmPlan plan) {
  const int64_t tiles = static_cast<int64_t>(plan.token_tiles) * plan.row_tiles;
  const int64_t units = tiles * plan.col_tiles, tile = blockIdx.x;
  const int64_t first = block_of(units, plan.blocks, tile * plan.col_tiles);
  const int64_t last = block_of(units, plan.blocks, (tile + 1) * plan.col_tiles - 1);
  if (first == last) return;
  const int64_t first_token = tile % plan.token_tiles * plan.tile_tokens;
  const int row = threadIdx.x % (kRows / 8) * 8;
  const int64_t first_row = tile / plan.token_tiles * kRows + row;
  const int64_t count = args.rows - first_row;
  for (int token = threadIdx.x / (kRows / 8); token < plan.tile_tokens; token += 8) {
    if (first_token + token >= args.tokens || count <= 0) break;
    float v[8] = {};
    for (int64_t part = first; part <= last; ++part) {
      const bool starts = first_unit(units, plan.blocks, part) <= tile * plan.col_tiles;
      const float* from = partial_of(args, plan, part, starts) + token * kRows + row;
      float low[4], high[4];
      load(low, from);
      load(high, from + 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] += low[i], v[i + 4] += high[i];
    }
    finish(args, first_token + token, first_row, v, count < 8 ? count : 8);
  }
}

}  // namespace

GemmPlan pick(const GemmArgs& args, const DeviceInfo& device) {
  GemmPlan plan;
  plan.tile_tokens = args.tokens <= 16 ? 16 : args.tokens <= 64 ? 64 : 128;
  plan.token_tiles = divide_up(args.tokens, plan.tile_tokens);
  plan.row_tiles = divide_up(args.rows, kRows);
  plan.col_tiles = divide_up(args.cols, args.x_scales != nullptr ? 2 * kCols : kCols);
  const int64_t tiles = static_cast<int64_t>(plan.token_tiles) * plan.row_tiles;
  const int64_t units = tiles * plan.col_tiles;
  plan.blocks = tiles;
  // Fewer tiles than the device can hold at once: share them. Two blocks per multiprocessor hide
  // each other's barriers, but a short run of units drowns in its partial sums.
  if (!args.invariant && tiles < 2 * device.multiprocessors) {
    const int64_t wanted = units >= 2 * 16 * device.multiprocessors ? 2 * device.multiprocessors
                                                                    : device.multiprocessors;
    const int64_t limit = divide_up(units, 4);
    plan.blocks = wanted < limit ? wanted : limit;
  }
  plan.groups = args.group_size > 0 ? divide_up(args.cols, args.group_size) : 1;
  plan.scale_shift = 0;
  if (args.group_size >= args.cols) plan.scale_shift = 30;
  while (args.group_size < args.cols && (kCols << plan.scale_shift) < args.group_size)
    ++plan.scale_shift;
  plan.split = units > 0 && (units % plan.blocks != 0 || units / plan.blocks % plan.col_tiles != 0);
  return plan;
}

int merge_gemm(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  return launch("gemm_merge", gemm_merge_kernel, dim3(plan.token_tiles * plan.row_tiles),
                dim3(kMergeThreads), 0, stream, args, plan);
}

}  // namespace qn::cuda

extern "C" void qn_cuda_gemm_plan(const qn::cuda::GemmArgs* args,
                                  const qn::cuda::DeviceInfo* device, qn::cuda::GemmPlan* plan) {
  *plan = qn::cuda::pick(*args, *device);
}

extern "C" int64_t qn_cuda_gemm_workspace(const qn::cuda::GemmPlan* plan) {
  const int64_t slot = static_cast<int64_t>(plan->tile_tokens) * qn::cuda::kRows * sizeof(float);
  return plan->split ? 2 * plan->blocks * slot : 0;
}
