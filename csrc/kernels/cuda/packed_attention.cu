// Causal attention within packed documents, for training: out = softmax(scale q k^T) v, and the
// log-sum-exp (base 2) of each row's scores, from which packed_attention_bwd.cu computes the
// probabilities again (FlashAttention-2, arXiv 2307.08691). The arithmetic is that of inference,
// attention.cuh; keys and values lie in plain tensors.
//
//   block    64 query rows of one document and kv head, one warp per 16 rows, against tiles of 64
//            keys; two tiles, one computed, one under way, as in attention_prefill.cu
//   bytes    every 64 rows read their keys and values once: heads of a group share them; 4 per row
//            for the log-sum-exp. 4 * head_dim operations per row and key; tiles beyond the
//            diagonal are never started
//   shared   512 * head_dim bytes and padding, 37 .. 70 KB, two blocks per multiprocessor
//   roofline as attention_prefill.cu: ldmatrix and exponentials beside the mma leave 60 to 70 % of
//            A100's matrix peak; H100's needs wgmma, about 40 % of it is within reach
#include "kernels/cuda/packed_attention.cuh"

namespace qn::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kRows = kWarps * kRowTile;
constexpr int kKeys = 64;

template <int HeadDim>
union alignas(128) Shared {
  Bf16Tile<HeadDim, kKeys> tile[2];
  struct {
    Bf16Tile<HeadDim, kKeys> first;
    bf16 q[kRows][HeadDim + 8];
  } start;
  float out[kRows][HeadDim + 8];
};

template <int HeadDim>
QN_DEV void fetch_keys(Bf16Tile<HeadDim, kKeys>& tile, const DocumentAttentionArgs& args,
                       const Document& document, int first, int end) {
  copy_tile<HeadDim, kKeys, kThreads>(tile.keys, args.k, end - first, [&](int row) {
    return document.key_offset<HeadDim>(args.k_stride, first + row);
  });
  copy_tile<HeadDim, kKeys, kThreads>(tile.values, args.v, end - first, [&](int row) {
    return document.key_offset<HeadDim>(args.v_stride, first + row);
  });
}

template <int HeadDim>
__global__ __launch_bounds__(kThreads, 2) void packed_attention_kernel(DocumentAttentionArgs args) {
  using Cache = Bf16Cache<HeadDim>;
  constexpr int kChunks = HeadDim / 8;
  Shared<HeadDim>& shared = shared_as<Shared<HeadDim>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Document document(args, blockIdx.z, blockIdx.y);
  const int rows = document.rows(), group = document.group;
  const int first_row = (gridDim.x - 1 - blockIdx.x) * kRows;  // the longest first
  if (first_row >= rows) return;
  const int last_row = (first_row + kRows < rows ? first_row + kRows : rows) - 1;
  // Keys that some row of this block sees.
  const int end = last_row / group + 1, oldest = first_row / group + 1 - args.window;
  const int begin = args.window > 0 && oldest > 0 ? oldest / kKeys * kKeys : 0;

  fetch_keys<HeadDim>(shared.tile[0], args, document, begin, end);
  copy_tile<HeadDim, kRows, kThreads>(shared.start.q, args.q, rows - first_row, [&](int row) {
    return document.query_offset<HeadDim>(args.q_stride, first_row + row);
  });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  RowState<Cache> state;
  state.start(&shared.start.q[warp * kRowTile], lane);

  int position[2];
#pragma unroll
  for (int p = 0; p < 2; ++p)
    position[p] = (first_row + warp * kRowTile + lane / 4 + p * 8) / group;
  const int first_position = first_row / group, last_position = end - 1;

  for (int key = begin, stage = 0; key < end; key += kKeys, stage ^= 1) {
    __syncthreads();
    if (key + kKeys < end)
      fetch_keys<HeadDim>(shared.tile[stage ^ 1], args, document, key + kKeys, end);
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
    const int row = warp * kRowTile + lane / 4 + p * 8;
    const float sum = lane_sum<4>(state.sum[p]);
    Cache::store_row(shared.out[row], state.out, p, lane, 1.0f / sum);
    if (args.lse != nullptr && lane % 4 == 0 && first_row + row < rows)
      args.lse[document.statistic_offset(args.tokens, first_row + row)] =
          state.max[p] + log2_approx(sum);
  }
  __syncwarp();
  bf16* out = static_cast<bf16*>(args.out);
  for_chunks<kRowTile, kChunks, kWarp, false>(lane, [&](int warp_row, int chunk) {
    const int row = warp * kRowTile + warp_row, dim = chunk * 8;
    if (first_row + row >= rows) return;
    float v[8];
    load_neighbour(v, &shared.out[row][dim]);
    store(out + document.query_offset<HeadDim>(args.out_stride, first_row + row) + dim, v);
  });
}

template <int HeadDim>
struct Forward {
  static int run(const DocumentAttentionArgs& args, cudaStream_t stream) {
    const int64_t rows =
        static_cast<int64_t>(args.max_length) * (args.num_heads / args.num_kv_heads);
    const dim3 grid(divide_up(rows, kRows), args.num_kv_heads, args.documents);
    return launch("packed_attention", packed_attention_kernel<HeadDim>, grid, dim3(kThreads),
                  sizeof(Shared<HeadDim>), stream, args);
  }
};

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_packed_attention(const qn::cuda::DocumentAttentionArgs* args, void* stream) {
  using namespace qn::cuda;
  if (args->documents == 0 || args->max_length == 0) return 0;
  return for_head_dim<Forward>(args->head_dim, *args, static_cast<cudaStream_t>(stream));
}
