// Attention of many new tokens per sequence, packed one after the other (attention.cuh has the
// arithmetic): flash attention over pages, causal, with an optional window.
//
//                 64 keys
//            w0  ┌─────────┐      block: 64 rows (token, head of the group) of one sequence and
//   64 rows  w1  │ S = QK^T│      kv head, one warp per 16 rows; every warp fetches 16 of the 64
//            w2  │         │      keys and values of a tile; two tiles, one computed, one under
//            w3  └─────────┘      way
//
//   bytes    every 64 rows read their keys and values once: heads of a group share them.
//            4 * head_dim operations per row and key; tiles beyond the diagonal are never started
//   shared   bf16: 512 * head_dim bytes and padding, 37 .. 70 KB, two blocks per multiprocessor; q
//            passes through the second tile and then stays in registers
//   roofline a tile's keys and values cost a block 4 * head_dim mma and as many shared-memory
//            cycles of ldmatrix, at 2 tensor-core cycles per mma (A100): these limit it, beside 32
//            exponentials per lane, at 60 to 70 % of the peak
#include "kernels/cuda/attention.cuh"

namespace qn::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kRows = kWarps * kRowTile;
constexpr int kKeys = kWarps * kBlockKeys;

template <class Cache>
union alignas(128) Shared {
  typename Cache::template Tile<kKeys> tile[2];
  struct {
    typename Cache::template Tile<kKeys> first;
    bf16 q[kRows][Cache::HeadDim + 8];
  } start;
  float out[kRows][Cache::HeadDim + 8];
};

template <class Cache>
__global__ __launch_bounds__(kThreads, 2) void attention_prefill_kernel(PagedAttentionArgs args) {
  constexpr int kHeadDim = Cache::kStoredDim, kChunks = kHeadDim / 8;
  constexpr int kTileChunks = Cache::HeadDim / 8;
  Shared<Cache>& shared = shared_as<Shared<Cache>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int kv_head_index = blockIdx.y, sequence = blockIdx.z;
  const int group = args.num_heads / args.kv.num_kv_heads;
  const int first_token = args.query_begin[sequence];
  const int query_len = args.query_begin[sequence + 1] - first_token;
  const int rows = query_len * group;
  const int first_row = (gridDim.x - 1 - blockIdx.x) * kRows;  // the longest first
  if (first_row >= rows) return;
  const int kv_len = args.kv_len[sequence], past = kv_len - query_len;
  const int last_row = (first_row + kRows < rows ? first_row + kRows : rows) - 1;
  // Keys that some row of this block sees.
  const int end = past + last_row / group + 1;
  const int oldest = past + first_row / group + 1 - args.window;
  const int begin = args.window > 0 && oldest > 0 ? oldest / kKeys * kKeys : 0;
  const int32_t* page_table =
      args.page_table + static_cast<int64_t>(sequence) * args.page_table_stride;

  fetch_block<Cache, kKeys>(shared.tile[0], warp * kBlockKeys, args.kv, page_table, kv_head_index,
                            begin + warp * kBlockKeys, end, lane);
  const bf16* q = static_cast<const bf16*>(args.q) + kv_head_index * group * kHeadDim;
  for_chunks<kRows, kTileChunks, kThreads>(threadIdx.x, [&](int row, int chunk) {
    const bool exists = first_row + row < rows && chunk < kChunks;
    const int64_t token = first_token + (first_row + row) / group;
    const int head = (first_row + row) % group;
    cp_async16(&shared.start.q[row][chunk * 8],
               exists ? q + token * args.q_stride + head * kHeadDim + chunk * 8 : q, exists);
  });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  RowState<Cache> state;
  state.start(&shared.start.q[warp * kRowTile], lane);

  int position[2];
#pragma unroll
  for (int p = 0; p < 2; ++p)
    position[p] = past + (first_row + warp * kRowTile + lane / 4 + p * 8) / group;
  // Rows of the block differ by less than this in position.
  const int first_position = past + first_row / group, last_position = end - 1;

  for (int key = begin, stage = 0; key < end; key += kKeys, stage ^= 1) {
    __syncthreads();
    if (key + kKeys < end)
      fetch_block<Cache, kKeys>(shared.tile[stage ^ 1], warp * kBlockKeys, args.kv, page_table,
                                kv_head_index, key + kKeys + warp * kBlockKeys, end, lane);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    int low[2], high[2];
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      low[p] = args.window > 0 ? position[p] + 1 - args.window - key : 0;
      high[p] = position[p] + 1 - key;
    }
    const bool masked =
        key + kKeys - 1 > first_position || (args.window > 0 && key <= last_position - args.window);
    state.template attend<kKeys / kBlockKeys, kKeys>(shared.tile[stage], 0, args.scale * kLog2E,
                                                     low, high, masked, lane);
  }
  cp_async_wait<0>();
  __syncthreads();

#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const float inverse = 1.0f / lane_sum<4>(state.sum[p]);
    Cache::store_row(shared.out[warp * kRowTile + lane / 4 + p * 8], state.out, p, lane, inverse);
  }
  __syncwarp();
  bf16* out = static_cast<bf16*>(args.out) + kv_head_index * group * kHeadDim;
  for_chunks<kRowTile, kChunks, kWarp, false>(lane, [&](int warp_row, int chunk) {
    const int row = warp * kRowTile + warp_row, dim = chunk * 8;
    if (first_row + row >= rows) return;
    const int64_t token = first_token + (first_row + row) / group;
    const int head = (first_row + row) % group;
    float v[8];
    load_neighbour(v, &shared.out[row][dim]);
    store(out + token * args.out_stride + head * kHeadDim + dim, v);
  });
}

template <class Cache>
struct Prefill {
  static int run(const PagedAttentionArgs& args, cudaStream_t stream) {
    const int group = args.num_heads / args.kv.num_kv_heads;
    const dim3 grid(divide_up(static_cast<int64_t>(args.max_query_len) * group, kRows),
                    args.kv.num_kv_heads, args.sequences);
    return launch("attention_prefill", attention_prefill_kernel<Cache>, grid, dim3(kThreads),
                  sizeof(Shared<Cache>), stream, args);
  }
};

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_attention_prefill(const qn::cuda::PagedAttentionArgs* args, void* stream) {
  using namespace qn::cuda;
  if (args->sequences == 0 || args->max_query_len == 0) return 0;
  return for_cache<Prefill>(args->kv, *args, static_cast<cudaStream_t>(stream));
}
