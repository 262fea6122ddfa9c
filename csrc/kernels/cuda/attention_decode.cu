// Attention of one new token per sequence (attention.cuh has the arithmetic).
//
//   block    one part of one sequence's keys x one kv head x up to 16 of its heads; a part is 256
//            keys, twice as many when more than four heads share a kv head and twice as many in
//            an int8 cache, which keeps the bytes of partial results below 5 %
//   warp     every fourth 16 keys of the part, fetched and consumed by itself: two stages of
//            cp.async, no barrier of the block until the four warps' results are merged
//   merge    sequences with more than one part leave unnormalised rows, maxima and sums in the
//            workspace, and a second kernel sums them in order. Parts begin at fixed positions: a
//            result does not depend on the batch
//   bytes    every key and value once per kv head; partial rows 8 bytes per head, head_dim and
//            part
//   shared   bf16: 544 * head_dim bytes and padding, 35 .. 74 KB: two or more blocks per
//            multiprocessor, 32 KB in flight each
//   roofline 1 mma per 256 bytes of bf16 cache (128 bytes per cycle and multiprocessor), where
//            global memory gives A100 10 bytes and H100 15: bound by its bandwidth, of which the
//            counted traffic leaves at least 95 %
#include "kernels/cuda/attention.cuh"

namespace qn::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kStages = 2;

int part_tokens(const PagedAttentionArgs& args) {
  const int large_group = args.num_heads > 4 * args.kv.num_kv_heads;
  return 256 << (large_group + (args.kv.bits == 8));
}

struct DecodePlan {
  int32_t part_tokens, parts;
  int32_t row_tiles;  // of 16 heads, per kv head
};

DecodePlan plan_of(const PagedAttentionArgs& args) {
  DecodePlan plan;
  plan.part_tokens = part_tokens(args);
  plan.parts = static_cast<int32_t>(divide_up(args.max_kv_len, plan.part_tokens));
  plan.row_tiles = static_cast<int32_t>(divide_up(args.num_heads / args.kv.num_kv_heads, kRowTile));
  return plan;
}

/// Parts [begin, end) of a sequence that hold keys it sees.
struct PartRange {
  int first_key, begin, end;
};
QN_DEV PartRange parts_of(const PagedAttentionArgs& args, const DecodePlan& plan, int kv_len) {
  const int first = args.window > 0 && kv_len > args.window ? kv_len - args.window : 0;
  return PartRange{first, first / plan.part_tokens,
                   (kv_len + plan.part_tokens - 1) / plan.part_tokens};
}

/// Workspace: rows [sequences][parts][num_heads][head_dim], then maxima and sums, pairs of the same
/// leading shape.
QN_DEV int64_t row_index(const PagedAttentionArgs& args, const DecodePlan& plan, int64_t sequence,
                         int64_t part, int64_t head) {
  return (sequence * plan.parts + part) * args.num_heads + head;
}
QN_DEV float* pairs_of(const PagedAttentionArgs& args, const DecodePlan& plan) {
  return args.workspace +
         row_index(args, plan, args.sequences, 0, 0) * static_cast<int64_t>(args.kv.head_dim);
}

template <class Cache>
union alignas(128) Shared {
  struct {
    bf16 q[kRowTile][Cache::HeadDim + 8];
    typename Cache::template Tile<kBlockKeys> tile[kWarps][kStages];
  } work;
  struct {
    float out[kWarps][kRowTile][Cache::HeadDim + 8];
    float max[kWarps][kRowTile], sum[kWarps][kRowTile];
  } result;
};

template <class Cache>
__global__ __launch_bounds__(kThreads) void attention_decode_kernel(PagedAttentionArgs args,
                                                                    DecodePlan plan) {
  constexpr int kHeadDim = Cache::kStoredDim, kTileChunks = Cache::HeadDim / 8;
  Shared<Cache>& shared = shared_as<Shared<Cache>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int sequence = blockIdx.z, part = blockIdx.x;
  const int kv_head_index = blockIdx.y / plan.row_tiles;
  const int group = args.num_heads / args.kv.num_kv_heads;
  const int first_row = blockIdx.y % plan.row_tiles * kRowTile;
  const int rows = group - first_row < kRowTile ? group - first_row : kRowTile;
  const int head = kv_head_index * group + first_row;
  const int kv_len = args.kv_len[sequence];
  const PartRange range = parts_of(args, plan, kv_len);
  if (part < range.begin || part >= range.end) return;

  const int part_begin = part * plan.part_tokens, part_end = part_begin + plan.part_tokens;
  const int begin = range.first_key > part_begin ? range.first_key : part_begin;
  const int end = kv_len < part_end ? kv_len : part_end;
  const int32_t* page_table =
      args.page_table + static_cast<int64_t>(sequence) * args.page_table_stride;

  const bf16* q = static_cast<const bf16*>(args.q) + sequence * args.q_stride + head * kHeadDim;
  for_chunks<kRowTile, kTileChunks, kThreads>(threadIdx.x, [&](int row, int chunk) {
    const bool exists = row < rows && chunk < kHeadDim / 8;
    cp_async16(&shared.work.q[row][chunk * 8], exists ? q + row * kHeadDim + chunk * 8 : q, exists);
  });
  cp_async_commit();

  auto& tiles = shared.work.tile[warp];
  int key = begin / kBlockKeys * kBlockKeys + warp * kBlockKeys;
  fetch_block<Cache, kBlockKeys>(tiles[0], 0, args.kv, page_table, kv_head_index, key, end, lane);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  RowState<Cache> state;
  state.start(shared.work.q, lane);

  for (int stage = 0; key < end; key += kWarps * kBlockKeys, stage ^= 1) {
    const int next = key + kWarps * kBlockKeys;
    if (next < end)
      fetch_block<Cache, kBlockKeys>(tiles[stage ^ 1], 0, args.kv, page_table, kv_head_index, next,
                                     end, lane);
    cp_async_commit();
    cp_async_wait<1>();
    __syncwarp();
    const int low[2] = {begin - key, begin - key}, high[2] = {end - key, end - key};
    const bool masked = key < begin || key + kBlockKeys > end;
    state.template attend<1, kBlockKeys>(tiles[stage], 0, args.scale * kLog2E, low, high, masked,
                                         lane);
    __syncwarp();
  }
  cp_async_wait<0>();
  __syncthreads();

  auto& result = shared.result;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const int row = lane / 4 + p * 8;
    const float sum = lane_sum<4>(state.sum[p]);
    Cache::store_row(result.out[warp][row], state.out, p, lane, 1.0f);
    if (lane % 4 == 0) {
      result.max[warp][row] = state.max[p];
      result.sum[warp][row] = sum;
    }
  }
  __syncthreads();

  const bool whole = range.end - range.begin == 1;
  for (int index = threadIdx.x; index < rows * (kHeadDim / 4); index += kThreads) {
    const int row = index / (kHeadDim / 4), dim = index % (kHeadDim / 4) * 4;
    float largest = result.max[0][row], sum = 0.0f, v[4] = {};
#pragma unroll
    for (int w = 1; w < kWarps; ++w) largest = fmaxf(largest, result.max[w][row]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2_approx(result.max[w][row] - largest);
      sum += weight * result.sum[w][row];
      float o[4];
      load(o, &result.out[w][row][dim]);
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] += weight * o[i];
    }
    if (whole) {
      const float inverse = 1.0f / sum;
      bf16* out =
          static_cast<bf16*>(args.out) + sequence * args.out_stride + (head + row) * kHeadDim + dim;
      st8(out, uint2{pack_bf16(v[0] * inverse, v[1] * inverse),
                     pack_bf16(v[2] * inverse, v[3] * inverse)});
    } else {
      const int64_t at = row_index(args, plan, sequence, part, head + row);
      store(args.workspace + at * kHeadDim + dim, v);
      if (dim == 0)
        st8(pairs_of(args, plan) + at * 2, uint2{__float_as_uint(largest), __float_as_uint(sum)});
    }
  }
}

/// One warp per head: lane l has the dims 4 l .. 4 l + 3.
__global__ __launch_bounds__(kThreads) void attention_merge_kernel(PagedAttentionArgs args,
                                                                   DecodePlan plan) {
  const int sequence = blockIdx.y, head = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int dim = threadIdx.x % kWarp * 4, head_dim = args.kv.head_dim;
  if (head >= args.num_heads || dim >= head_dim) return;
  const PartRange range = parts_of(args, plan, args.kv_len[sequence]);
  if (range.end - range.begin <= 1) return;
  const float* pairs = pairs_of(args, plan);
  float largest = -INFINITY, sum = 0.0f, v[4] = {};
  for (int part = range.begin; part < range.end; ++part) {
    const int64_t at = row_index(args, plan, sequence, part, head);
    const uint2 pair = ld8(pairs + at * 2);
    const float max = bits_to_float(pair.x), bigger = fmaxf(largest, max);
    const float fade = exp2_approx(largest - bigger), weight = exp2_approx(max - bigger);
    float o[4];
    load(o, args.workspace + at * head_dim + dim);
    largest = bigger;
    sum = sum * fade + weight * bits_to_float(pair.y);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = v[i] * fade + weight * o[i];
  }
  const float inverse = 1.0f / sum;
  bf16* out = static_cast<bf16*>(args.out) + sequence * args.out_stride + head * head_dim + dim;
  st8(out,
      uint2{pack_bf16(v[0] * inverse, v[1] * inverse), pack_bf16(v[2] * inverse, v[3] * inverse)});
}

template <class Cache>
struct Decode {
  static int run(const PagedAttentionArgs& args, const DecodePlan& plan, cudaStream_t stream) {
    const dim3 grid(plan.parts, args.kv.num_kv_heads * plan.row_tiles, args.sequences);
    return launch("attention_decode", attention_decode_kernel<Cache>, grid, dim3(kThreads),
                  sizeof(Shared<Cache>), stream, args, plan);
  }
};

}  // namespace
}  // namespace qn::cuda

extern "C" int64_t qn_cuda_attention_decode_workspace(const qn::cuda::PagedAttentionArgs* args) {
  const int64_t parts = qn::cuda::plan_of(*args).parts;
  if (parts == 1) return 0;
  return args->sequences * parts * args->num_heads * (args->kv.head_dim + 2) * sizeof(float);
}

extern "C" int qn_cuda_attention_decode(const qn::cuda::PagedAttentionArgs* args, void* stream) {
  using namespace qn::cuda;
  if (args->sequences == 0) return 0;
  const DecodePlan plan = plan_of(*args);
  const int error = for_cache<Decode>(args->kv, *args, plan, static_cast<cudaStream_t>(stream));
  if (error != 0 || plan.parts == 1) return error;
  return launch("attention_merge", attention_merge_kernel,
                dim3(divide_up(args->num_heads, kWarps), args->sequences), dim3(kThreads), 0,
                static_cast<cudaStream_t>(stream), *args, plan);
}
