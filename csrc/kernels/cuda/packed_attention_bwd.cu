// Gradients of packed_attention.cu: with P = exp2(scale log2(e) q k^T - lse), dP = dout v^T,
// delta = sum(out * dout) per row and dS = P * (dP - delta),
//
//   dv = P^T dout,  dk = scale dS^T q,  dq = scale dS k
//
// Two kernels of one body: a block keeps 64 rows of two tensors ("own") and lets tiles of two
// others pass by. One owns keys and values and sums dk and dv over all query rows of the group's
// heads; one owns q and dout and sums dq over keys. Each computes P again, so that every sum has
// one owner: no atomics, the same bits on every run.
//
//                       passing: 64 rows, 32 with head_dim > 64
//             w0 ┌────────────┐        S = own[0] passing[0]^T, dP = own[1] passing[1]^T
//   64 own    w1 │  S, P, dS  │        sums[0] += dS passing[0]
//   rows      w2 │            │        sums[1] += P passing[1]     (keys only)
//             w3 └────────────┘        16 own rows per warp; P and dS go from sums to operands
//                                      in registers
//
//   bytes    a block reads its own rows once and everything that sees them or that they see once,
//            2 * 2 * head_dim per row. 14 * head_dim operations per query row and key, 10 are
//            needed; tiles beyond the diagonal are never started. delta: reads out and dout once
//   shared   56 .. 70 KB, two blocks per multiprocessor
//   registers up to 255: the sums of dk and dv are head_dim floats of each lane
//   roofline 16 own rows per warp make every operand of the passing side go through ldmatrix for
//            two mma, as many shared-memory cycles as tensor-core cycles (A100): about half of the
//            matrix peak, 35 % counted in needed operations; H100, whose peak needs wgmma, 20 %
#include "kernels/cuda/packed_attention.cuh"

namespace qn::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kOwn = kWarps * kRowTile;

template <int HeadDim>
constexpr int kPassing = HeadDim <= 64 ? 64 : 32;

template <int HeadDim>
struct alignas(128) Shared {
  bf16 own[2][kOwn][HeadDim + 8];
  struct Stage {
    bf16 passing[2][kPassing<HeadDim>][HeadDim + 8];
    float lse[kPassing<HeadDim>], delta[kPassing<HeadDim>];  // where query rows pass by
  } stage[2];
};

/// Starts the copies of a stage: rows first .. of those before `end`.
template <int HeadDim, bool OwnsKeys>
QN_DEV void fetch(typename Shared<HeadDim>::Stage& stage, const DocumentAttentionArgs& args,
                  const Document& document, int first, int end) {
  constexpr int kRows = kPassing<HeadDim>;
  if constexpr (OwnsKeys) {
    copy_tile<HeadDim, kRows, kThreads>(stage.passing[0], args.q, end - first, [&](int row) {
      return document.query_offset<HeadDim>(args.q_stride, first + row);
    });
    copy_tile<HeadDim, kRows, kThreads>(stage.passing[1], args.dout, end - first, [&](int row) {
      return document.query_offset<HeadDim>(args.dout_stride, first + row);
    });
    const int row = threadIdx.x % kRows;
    const bool exists = first + row < end, is_delta = threadIdx.x >= kRows;
    const float* from = is_delta ? args.delta : args.lse;
    if (threadIdx.x < 2 * kRows)
      cp_async4(is_delta ? &stage.delta[row] : &stage.lse[row],
                exists ? from + document.statistic_offset(args.tokens, first + row) : from, exists);
  } else {
    copy_tile<HeadDim, kRows, kThreads>(stage.passing[0], args.k, end - first, [&](int row) {
      return document.key_offset<HeadDim>(args.k_stride, first + row);
    });
    copy_tile<HeadDim, kRows, kThreads>(stage.passing[1], args.v, end - first, [&](int row) {
      return document.key_offset<HeadDim>(args.v_stride, first + row);
    });
  }
}

/// product = own rows x passing rows^T; `own` are the warp's 16 rows.
template <int HeadDim, int Tiles>
QN_DEV void multiply(float (&product)[Tiles][4], const bf16 (*own)[HeadDim + 8],
                     const bf16 (*passing)[HeadDim + 8], int lane) {
#pragma unroll
  for (int j = 0; j < Tiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) product[j][e] = 0.0f;
#pragma unroll
  for (int step = 0; step < HeadDim / 16; ++step) {
    uint32_t a[4];
    ldmatrix_x4(a, &own[lane % 16][step * 16 + lane / 16 * 8]);
#pragma unroll
    for (int j = 0; j < Tiles; j += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, &passing[j * 8 + lane % 8 + lane / 16 * 8][step * 16 + lane / 8 % 2 * 8]);
      mma_bf16(product[j], a, b[0], b[1]);
      mma_bf16(product[j + 1], a, b[2], b[3]);
    }
  }
}

/// sums += factors x passing rows.
template <int HeadDim, int Tiles>
QN_DEV void accumulate(float (&sums)[HeadDim / 8][4], const float (&factors)[Tiles][4],
                       const bf16 (*passing)[HeadDim + 8], int lane) {
#pragma unroll
  for (int block = 0; block < Tiles / 2; ++block) {
    const float (&left)[4] = factors[block * 2];
    const float (&right)[4] = factors[block * 2 + 1];
    const uint32_t a[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]),
                           pack_bf16(right[0], right[1]), pack_bf16(right[2], right[3])};
#pragma unroll
    for (int j = 0; j < HeadDim / 8; j += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, &passing[block * 16 + lane % 16][j * 8 + lane / 16 * 8]);
      mma_bf16(sums[j], a, b[0], b[1]);
      mma_bf16(sums[j + 1], a, b[2], b[3]);
    }
  }
}

/// The warp's 16 rows as bf16 through its rows of shared memory; row i to `to` + offset(i).
template <int HeadDim, class Offset>
QN_DEV void store_rows(bf16 (*rows)[HeadDim + 8], const float (&sums)[HeadDim / 8][4], float factor,
                       void* to, int count, int lane, const Offset& offset) {
#pragma unroll
  for (int j = 0; j < HeadDim / 8; ++j)
#pragma unroll
    for (int p = 0; p < 2; ++p)
      st4(&rows[lane / 4 + p * 8][j * 8 + lane % 4 * 2],
          pack_bf16(sums[j][p * 2] * factor, sums[j][p * 2 + 1] * factor));
  __syncwarp();
  for_chunks<kRowTile, HeadDim / 8, kWarp, false>(lane, [&](int row, int chunk) {
    if (row >= count) return;
    st16(static_cast<bf16*>(to) + offset(row) + chunk * 8, ld16(&rows[row][chunk * 8]));
  });
}

template <int HeadDim, bool OwnsKeys>
__global__ __launch_bounds__(kThreads,
                             2) void packed_attention_bwd_kernel(DocumentAttentionArgs args) {
  constexpr int kRows = kPassing<HeadDim>, kTiles = kRows / 8;
  Shared<HeadDim>& shared = shared_as<Shared<HeadDim>>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Document document(args, blockIdx.z, blockIdx.y);
  const int group = document.group, window = args.window;
  const int count = OwnsKeys ? document.length : document.rows();
  // The longest first: keys at the beginning, queries at the end.
  const int first = (OwnsKeys ? blockIdx.x : gridDim.x - 1 - blockIdx.x) * kOwn;
  if (first >= count) return;
  const int last = (first + kOwn < count ? first + kOwn : count) - 1;

  int begin, end;  // what passes by: rows that see one of these keys, or keys that they see
  if constexpr (OwnsKeys) {
    begin = first * group / kRows * kRows;
    end = document.rows();
    if (window > 0 && (last + window) * group < end) end = (last + window) * group;
    copy_tile<HeadDim, kOwn, kThreads>(shared.own[0], args.k, count - first, [&](int row) {
      return document.key_offset<HeadDim>(args.k_stride, first + row);
    });
    copy_tile<HeadDim, kOwn, kThreads>(shared.own[1], args.v, count - first, [&](int row) {
      return document.key_offset<HeadDim>(args.v_stride, first + row);
    });
  } else {
    const int oldest = first / group + 1 - window;
    begin = window > 0 && oldest > 0 ? oldest / kRows * kRows : 0;
    end = last / group + 1;
    copy_tile<HeadDim, kOwn, kThreads>(shared.own[0], args.q, count - first, [&](int row) {
      return document.query_offset<HeadDim>(args.q_stride, first + row);
    });
    copy_tile<HeadDim, kOwn, kThreads>(shared.own[1], args.dout, count - first, [&](int row) {
      return document.query_offset<HeadDim>(args.dout_stride, first + row);
    });
  }
  fetch<HeadDim, OwnsKeys>(shared.stage[0], args, document, begin, end);
  cp_async_commit();

  const int own_row = first + warp * kRowTile + lane / 4;  // of the lane's two, 8 apart
  float own_lse[2] = {}, own_delta[2] = {};
  int own_position[2];
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const int row = own_row + p * 8;
    own_position[p] = OwnsKeys ? row : row / group;
    if (!OwnsKeys && row < count) {
      own_lse[p] = args.lse[document.statistic_offset(args.tokens, row)];
      own_delta[p] = args.delta[document.statistic_offset(args.tokens, row)];
    }
  }
  const int own_low = OwnsKeys ? first : first / group, own_high = OwnsKeys ? last : last / group;
  const float scale = args.scale * kLog2E;
  float sums[OwnsKeys ? 2 : 1][HeadDim / 8][4] = {};

  for (int row = begin, number = 0; row < end; row += kRows, number ^= 1) {
    __syncthreads();
    if (row + kRows < end)
      fetch<HeadDim, OwnsKeys>(shared.stage[number ^ 1], args, document, row + kRows, end);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const auto& stage = shared.stage[number];
    float s[kTiles][4], ds[kTiles][4];
    multiply<HeadDim>(s, &shared.own[0][warp * kRowTile], stage.passing[0], lane);
    multiply<HeadDim>(ds, &shared.own[1][warp * kRowTile], stage.passing[1], lane);

    const int low = OwnsKeys ? row / group : row;
    const int high = OwnsKeys ? (row + kRows - 1) / group : row + kRows - 1;
    const int first_query = OwnsKeys ? low : own_low, last_query = OwnsKeys ? high : own_high;
    const int first_key = OwnsKeys ? own_low : low, last_key = OwnsKeys ? own_high : high;
    const bool masked = last_key > first_query || (window > 0 && first_key <= last_query - window);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int column = j * 8 + lane % 4 * 2 + side;
        const float passing_lse = OwnsKeys ? stage.lse[column] : 0.0f;
        const float passing_delta = OwnsKeys ? stage.delta[column] : 0.0f;
        const int position = !masked ? 0 : OwnsKeys ? (row + column) / group : row + column;
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const int e = p * 2 + side;
          float probability =
              exp2_approx(fmaf(s[j][e], scale, -(OwnsKeys ? passing_lse : own_lse[p])));
          if (masked) {
            const int query = OwnsKeys ? position : own_position[p];
            const int key = OwnsKeys ? own_position[p] : position;
            if (key > query || (window > 0 && key <= query - window)) probability = 0.0f;
          }
          s[j][e] = probability;
          ds[j][e] = probability * (ds[j][e] - (OwnsKeys ? passing_delta : own_delta[p]));
        }
      }
    if constexpr (OwnsKeys) accumulate<HeadDim>(sums[1], s, stage.passing[1], lane);
    accumulate<HeadDim>(sums[0], ds, stage.passing[0], lane);
  }
  cp_async_wait<0>();
  __syncwarp();

  const int warp_first = first + warp * kRowTile, left = count - warp_first;
  bf16(*const rows)[HeadDim + 8] = &shared.own[0][warp * kRowTile];
  if constexpr (OwnsKeys) {
    store_rows<HeadDim>(rows, sums[0], args.scale, args.dk, left, lane, [&](int row) {
      return document.key_offset<HeadDim>(args.dk_stride, warp_first + row);
    });
    store_rows<HeadDim>(
        &shared.own[1][warp * kRowTile], sums[1], 1.0f, args.dv, left, lane,
        [&](int row) { return document.key_offset<HeadDim>(args.dv_stride, warp_first + row); });
  } else {
    store_rows<HeadDim>(rows, sums[0], args.scale, args.dq, left, lane, [&](int row) {
      return document.query_offset<HeadDim>(args.dq_stride, warp_first + row);
    });
  }
}

constexpr int kDeltaThreads = 256, kDeltaLanes = 16;

/// delta[head, token] = sum(out * dout); 16 lanes have a head.
__global__ __launch_bounds__(kDeltaThreads) void packed_attention_delta_kernel(
    DocumentAttentionArgs args) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kDeltaThreads / kDeltaLanes) + threadIdx.x / kDeltaLanes;
  const int64_t token = row / args.num_heads, head = row % args.num_heads;
  const int dim = threadIdx.x % kDeltaLanes * 8;
  float sum = 0.0f;
  if (token < args.tokens && dim < args.head_dim) {
    const int64_t offset = head * args.head_dim + dim;
    float a[8], b[8];
    load(a, static_cast<const bf16*>(args.out) + token * args.out_stride + offset);
    load(b, static_cast<const bf16*>(args.dout) + token * args.dout_stride + offset);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
  }
  sum = lane_sum<kDeltaLanes>(sum);
  if (token < args.tokens && dim == 0) args.delta[head * args.tokens + token] = sum;
}

template <int HeadDim>
struct Backward {
  static int run(const DocumentAttentionArgs& args, cudaStream_t stream) {
    const int64_t rows =
        static_cast<int64_t>(args.max_length) * (args.num_heads / args.num_kv_heads);
    const dim3 keys(divide_up(args.max_length, kOwn), args.num_kv_heads, args.documents);
    const dim3 queries(divide_up(rows, kOwn), args.num_kv_heads, args.documents);
    const int error =
        launch("packed_attention_bwd_keys", packed_attention_bwd_kernel<HeadDim, true>, keys,
               dim3(kThreads), sizeof(Shared<HeadDim>), stream, args);
    if (error != 0) return error;
    return launch("packed_attention_bwd_queries", packed_attention_bwd_kernel<HeadDim, false>,
                  queries, dim3(kThreads), sizeof(Shared<HeadDim>), stream, args);
  }
};

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_packed_attention_bwd(const qn::cuda::DocumentAttentionArgs* args,
                                            void* stream) {
  using namespace qn::cuda;
  if (args->documents == 0 || args->max_length == 0) return 0;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const int64_t blocks = divide_up(args->tokens * args->num_heads, kDeltaThreads / kDeltaLanes);
  const int error =
      launch("packed_attention_delta", packed_attention_delta_kernel,
             dim3(static_cast<unsigned>(blocks)), dim3(kDeltaThreads), 0, queue, *args);
  if (error != 0) return error;
  return for_head_dim<Backward>(args->head_dim, *args, queue);
}
