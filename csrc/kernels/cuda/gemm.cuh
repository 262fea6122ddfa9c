// out = x W^T (+ bias) (+ residual): the pipeline that the GEMMs share. They differ in Weight: how
// a tile of W comes to shared memory and becomes B registers, whether x lies transposed, and what
// the tensor cores multiply: bf16 pairs, or bytes in their place (gemm_w8a8.cu).
//
//                     64 cols
//              x  ┌──────────┐            block: kRows = 128 rows of W x Tokens tokens of x,
//        Tokens   │          │            4 warps beside each other, 32 rows of W each; with 128
//                 └──────────┘            tokens twice four warps, 64 tokens each.
//        W  128   ┌──┬──┬──┬──┐ rows      A = x (ldmatrix), B = W, m16n8k16, float32 sums.
//                 │w0│w1│w2│w3│
//
// cp.async fills a ring of kStages stages; there is one barrier per 64 columns. Rows of x are 128
// bytes, their eight 16-byte chunks swizzled by row % 8, so neither the copies nor ldmatrix meet a
// bank twice. A quantised weight's codes go into the tensor cores as integers, exact in bf16; the
// float32 sums of a group are then multiplied by its scale, which leaves no rounding but that of
// x's and the result's storage. The result passes through shared memory to leave in whole sectors.
#pragma once
#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm_layout.h"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {

constexpr int kRows = 128;  // of W, a block's share
constexpr int kCols = 64;   // one stage
constexpr int kChunks = kCols / 8;
constexpr int kWarpRows = 32;
constexpr int kRowTiles = kWarpRows / 8;
constexpr int kOutPad = 8;  // floats; makes the row stride 8 banks off a multiple of 32

/// Column chunk of a row of 128 bytes in shared memory.
QN_DEV int swizzle(int row, int chunk) { return chunk ^ (row & 7); }

/// The same for rows of Chunks chunks of 16 bytes, 2 or at least 8.
template <int Chunks>
QN_DEV int swizzle_row(int row, int chunk) {
  return Chunks >= 8 ? swizzle(row, chunk) : chunk ^ (row * Chunks / 8 & (Chunks - 1));
}

/// Copies `Count` rows of 64 columns; rows from `rows` and columns from `cols` on become zeros.
template <int Count, int Threads>
QN_DEV void copy_rows(bf16 (*to)[kCols], const bf16* from, int64_t stride, int64_t first_row,
                      int64_t rows, int col, int64_t cols) {
#pragma unroll
  for (int i = 0; i < Count * kChunks / Threads; ++i) {
    const int index = threadIdx.x + i * Threads;
    const int row = index / kChunks, chunk = index % kChunks;
    const bool exists = first_row + row < rows && col + chunk * 8 < cols;
    cp_async16(&to[row][swizzle(row, chunk) * 8],
               exists ? from + (first_row + row) * stride + col + chunk * 8 : from, exists);
  }
}

/// The same of a matrix that lies transposed, [cols, rows]: 64 columns of `Count` rows. rows is a
/// multiple of 8.
template <int Count, int Threads>
QN_DEV void copy_columns(bf16 (*to)[Count], const bf16* from, int64_t stride, int64_t first_row,
                         int64_t rows, int col, int64_t cols) {
  constexpr int kRowChunks = Count / 8;
#pragma unroll
  for (int i = 0; i < kCols * kRowChunks / Threads; ++i) {
    const int index = threadIdx.x + i * Threads;
    const int line = index / kRowChunks, chunk = index % kRowChunks;
    const bool exists = first_row + chunk * 8 < rows && col + line < cols;
    cp_async16(&to[line][swizzle_row<kRowChunks>(line, chunk) * 8],
               exists ? from + (col + line) * stride + first_row + chunk * 8 : from, exists);
  }
}

/// Scales of the columns of one stage or more: two groups of 32 columns, or one larger group.
struct GroupScales {
  uint32_t scale[2][kRows / 2];  // half, of two neighbouring rows
  uint8_t zero[2][kRows];
};

/// Copies the scales (and zeros) of the groups that begin in stage `col` or hold it.
template <int Threads>
QN_DEV void fetch_scales(GroupScales& to, const GemmArgs& args, const GemmPlan& plan, int64_t row,
                         int col) {
  const int groups_per_stage = args.group_size == 32 ? 2 : 1;
  const int64_t padded_rows = packed_tiles(args.rows) * kPackedTile;
  const uint16_t* scales = static_cast<const uint16_t*>(args.scales);
  const uint8_t* zeros = static_cast<const uint8_t*>(args.zeros);
  constexpr int kScaleChunks = kRows / 8, kZeroChunks = kRows / 16;
  const int half = threadIdx.x / (kScaleChunks + kZeroChunks);
  const int chunk = threadIdx.x % (kScaleChunks + kZeroChunks);
  if (half >= groups_per_stage) return;
  const int64_t group = (col >> plan.scale_shift) * static_cast<int64_t>(groups_per_stage) + half;
  if (chunk < kScaleChunks) {
    const bool exists = group < plan.groups && row + chunk * 8 < padded_rows;
    cp_async16(&to.scale[half][chunk * 4],
               exists ? scales + group * padded_rows + row + chunk * 8 : scales, exists);
  } else if (zeros != nullptr) {
    const int begin = (chunk - kScaleChunks) * 16;
    const bool exists = group < plan.groups && row + begin < padded_rows;
    cp_async16(&to.zero[half][begin], exists ? zeros + group * padded_rows + row + begin : zeros,
               exists);
  }
}

/// Copies a stage's two tiles of packed codes.
template <int Bits, int Threads>
QN_DEV void fetch_codes(void* to, const GemmArgs& args, int64_t row, int col) {
  constexpr int kTileChunks = packed_tile_bytes(Bits) / 16;
  const int64_t row_tiles = packed_tiles(args.rows), col_tiles = packed_tiles(args.cols);
  const char* from = static_cast<const char*>(args.weight);
#pragma unroll
  for (int i = 0; i < 2 * kTileChunks / Threads; ++i) {
    const int chunk = threadIdx.x + i * Threads;
    const int64_t tile = row / kPackedTile + chunk / kTileChunks;
    const bool exists = tile < row_tiles;
    const int64_t offset =
        (tile * col_tiles + col) * packed_tile_bytes(Bits) + chunk % kTileChunks * 16;
    cp_async16(static_cast<char*>(to) + chunk * 16, exists ? from + offset : from, exists);
  }
}

/// One segment: the part [col_begin, col_end) of one tile, in stages of 64 columns.
struct Segment {
  int64_t token, row;  // of the tile's first element
  int col_begin, col_end;
};

template <class Weight, int Tokens>
struct GemmShape {
  static constexpr int kTokenWarps = Tokens == 128 ? 2 : 1;
  static constexpr int kThreads = 4 * kTokenWarps * kWarp;
  static constexpr int kWarpTokens = Tokens / kTokenWarps;
  static constexpr int kTokenTiles = kWarpTokens / 16;
  struct PlainInput {
    bf16 x[Tokens][kCols];

    QN_DEV void fetch(const GemmArgs& args, int64_t token, int col) {
      copy_rows<Tokens, kThreads>(x, static_cast<const bf16*>(args.x), args.x_stride, token,
                                  args.tokens, col * kCols, args.cols);
    }
    /// A registers of the tokens token .. token + 15.
    QN_DEV void fragment(uint32_t (&a)[4], int token, int lane, int step) const {
      const int row = token + lane % 16;
      ldmatrix_x4(a, &x[row][swizzle(row, step * 2 + lane / 16) * 8]);
    }
  };
  struct TransposedInput {
    bf16 x[kCols][Tokens];

    QN_DEV void fetch(const GemmArgs& args, int64_t token, int col) {
      copy_columns<Tokens, kThreads>(x, static_cast<const bf16*>(args.x), args.x_stride, token,
                                     args.tokens, col * kCols, args.cols);
    }
    QN_DEV void fragment(uint32_t (&a)[4], int token, int lane, int step) const {
      const int line = step * 16 + lane % 8 + lane / 16 * 8, chunk = token / 8 + lane / 8 % 2;
      ldmatrix_x4_trans(a, &x[line][swizzle_row<Tokens / 8>(line, chunk) * 8]);
    }
  };
  struct Stage {
    std::conditional_t<Weight::kInputTransposed, TransposedInput, PlainInput> input;
    typename Weight::Tile w;
  };
  static constexpr int kStages = sizeof(Stage) <= 8192 ? 6 : sizeof(Stage) <= 20480 ? 4 : 3;
  struct Ring {
    Stage stage[kStages];
    typename Weight::Scales scales[kStages];
  };
  union alignas(128) Shared {
    Ring ring;
    float out[Tokens][kRows + kOutPad];
  };
};

/// Adds the epilogue and stores `count` neighbouring results of a token.
QN_DEV void finish(const GemmArgs& args, int64_t token, int64_t row, float (&v)[8], int count) {
  const bf16* bias = static_cast<const bf16*>(args.bias);
  const bf16* residual = static_cast<const bf16*>(args.residual);
  if (residual != nullptr) residual += token * args.residual_stride + row;
  const int64_t offset = token * args.out_stride + row;
  const bool aligned = count == 8 && (args.out_stride | args.residual_stride) % 8 == 0;
  if (args.x_scales != nullptr) {
    const float scale = args.x_scales[token];
    const float* row_scales = static_cast<const float*>(args.scales) + row;
    float low[4], high[4];
    load_some(low, row_scales, 0, count, true);
    load_some(high, row_scales + 4, 0, count - 4, true);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] *= scale * low[i], v[i + 4] *= scale * high[i];
  }
  if (aligned) {
    float extra[8];
    if (bias != nullptr) {
      load(extra, bias + row);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += extra[i];
    }
    if (residual != nullptr) {
      load(extra, residual);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += extra[i];
    }
    if (args.out_dtype == DType::BF16) {
      bf16* out = static_cast<bf16*>(args.out) + offset;
      if (args.add) {
        load(extra, out);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += extra[i];
      }
      store(out, v);
    } else {
      float* out = static_cast<float*>(args.out) + offset;
      if (args.add) {
        float low[4], high[4];
        load(low, out);
        load(high, out + 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] += low[i], v[i + 4] += high[i];
      }
      store(out, {v[0], v[1], v[2], v[3]});
      store(out + 4, {v[4], v[5], v[6], v[7]});
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= count) break;
    if (bias != nullptr) v[i] += load1(bias + row + i);
    if (residual != nullptr) v[i] += load1(residual + i);
    const auto store_at = [&](auto* out) { store1(out, args.add ? v[i] + load1(out) : v[i]); };
    if (args.out_dtype == DType::BF16)
      store_at(static_cast<bf16*>(args.out) + offset + i);
    else
      store_at(static_cast<float*>(args.out) + offset + i);
  }
}

template <class Weight, int Tokens>
class GemmBlock {
  using Shape = GemmShape<Weight, Tokens>;
  using Shared = typename Shape::Shared;
  static constexpr int kTokenTiles = Shape::kTokenTiles;
  static constexpr int kThreads = Shape::kThreads;
  static constexpr int kStages = Shape::kStages;
  using Sums = typename Weight::Sum[kTokenTiles][kRowTiles][4];

 public:
  QN_DEV GemmBlock(const GemmArgs& args, const GemmPlan& plan, Shared& shared)
      : args_(args),
        shared_(shared),
        lane_(threadIdx.x % kWarp),
        warp_row_(threadIdx.x / kWarp % 4 * kWarpRows),
        warp_token_(threadIdx.x / (4 * kWarp) * Shape::kWarpTokens),
        plan_(plan) {}

  /// Multiplies a segment and leaves the sums in shared_.out.
  QN_DEV void multiply(const Segment& segment) {
    Sums sums = {}, group = {};  // group is unused, and no register, without groups
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch(segment, segment.col_begin + i);
    // A group in steps of 32 columns, and how many of them are still to come.
    const int group_steps = args_.group_size / 32;
    int steps_left = Weight::kGrouped ? group_steps - segment.col_begin * 2 % group_steps : 0;
    for (int col = segment.col_begin; col < segment.col_end; ++col) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      fetch(segment, col + kStages - 1);
      const auto& stage = shared_.ring.stage[(col - segment.col_begin) % kStages];
      const auto& scales = shared_.ring.scales[scale_slot(col)];
      typename Weight::Registers registers;
      Weight::read(registers, stage.w, warp_row_, lane_);
#pragma unroll
      for (int step = 0; step < kCols / 16; ++step) {
        uint32_t a[kTokenTiles][4], b[kRowTiles][2];
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i)
          stage.input.fragment(a[i], warp_token_ + i * 16, lane_, step);
        if constexpr (Weight::kGrouped) {
          const int half = args_.group_size == 32 ? step / 2 : 0;
          Weight::fragments(b, registers, scales, half, warp_row_, lane_, step);
          accumulate(group, a, b);
          if (step % 2 == 1 && --steps_left == 0) {
            add_group(sums, group, scales.scale[half]);
            steps_left = group_steps;
          }
        } else {
          Weight::fragments(b, stage.w, warp_row_, lane_, step);
          accumulate(sums, a, b);
        }
      }
    }
    if constexpr (Weight::kGrouped) {
      if (steps_left != group_steps)
        add_group(sums, group, shared_.ring.scales[scale_slot(segment.col_end - 1)].scale[0]);
    }
    cp_async_wait<0>();
    __syncthreads();
    const int token = warp_token_ + lane_ / 4, row = warp_row_ + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i)
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          st8(&shared_.out[token + i * 16 + half * 8][row + j * 8],
              uint2{__float_as_uint(static_cast<float>(sums[i][j][half * 2])),
                    __float_as_uint(static_cast<float>(sums[i][j][half * 2 + 1]))});
      }
    __syncthreads();
  }

  /// Stores the sums of a whole tile as results.
  QN_DEV void store_results(const Segment& segment) {
    constexpr int kPerToken = kRows / 8;
    for (int index = threadIdx.x; index < Tokens * kPerToken; index += kThreads) {
      const int token = index / kPerToken, row = index % kPerToken * 8;
      const int64_t count = args_.rows - segment.row - row;
      if (segment.token + token >= args_.tokens || count <= 0) continue;
      float v[8];
      load_neighbour(v, &shared_.out[token][row]);
      finish(args_, segment.token + token, segment.row + row, v, count < 8 ? count : 8);
    }
    __syncthreads();
  }

  /// Stores the sums of a part of a tile.
  QN_DEV void store_partial(const Segment& segment, float* partial) {
    constexpr int kPerToken = kRows / 4;
    for (int index = threadIdx.x; index < Tokens * kPerToken; index += kThreads) {
      const int token = index / kPerToken, row = index % kPerToken * 4;
      if (segment.token + token >= args_.tokens) break;
      st16(partial + token * kRows + row, ld16(&shared_.out[token][row]));
    }
    __syncthreads();
  }

 private:
  QN_DEV void fetch(const Segment& segment, int col) {
    if (col < segment.col_end) {
      auto& stage = shared_.ring.stage[(col - segment.col_begin) % kStages];
      stage.input.fetch(args_, segment.token, col);
      Weight::template fetch<kThreads>(stage.w, args_, segment.row, col);
      if constexpr (Weight::kGrouped) {
        const bool starts_group = (col & ((1 << plan_.scale_shift) - 1)) == 0;
        if (col == segment.col_begin || starts_group)
          fetch_scales<kThreads>(shared_.ring.scales[scale_slot(col)], args_, plan_, segment.row,
                                 col);
      }
    }
    cp_async_commit();
  }

  QN_DEV int scale_slot(int col) const { return (col >> plan_.scale_shift) % kStages; }

  QN_DEV static void multiply_tile(float (&sum)[4], const uint32_t (&a)[4],
                                   const uint32_t (&b)[2]) {
    mma_bf16(sum, a, b[0], b[1]);
  }
  QN_DEV static void multiply_tile(int (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_s8(sum, a, b[0], b[1]);
  }

  QN_DEV static void accumulate(Sums& sums, const uint32_t (&a)[kTokenTiles][4],
                                const uint32_t (&b)[kRowTiles][2]) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) multiply_tile(sums[i][j], a[i], b[j]);
  }

  QN_DEV void add_group(Sums& sums, Sums& group, const uint32_t (&scale)[kRows / 2]) const {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      const uint32_t pair = scale[(warp_row_ + j * 8) / 2 + lane_ % 4];
      const float low = f16_lo(pair), high = f16_hi(pair);
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        sums[i][j][0] += low * group[i][j][0];
        sums[i][j][1] += high * group[i][j][1];
        sums[i][j][2] += low * group[i][j][2];
        sums[i][j][3] += high * group[i][j][3];
#pragma unroll
        for (int e = 0; e < 4; ++e) group[i][j][e] = 0.0f;
      }
    }
  }

  const GemmArgs& args_;
  Shared& shared_;
  const int lane_, warp_row_, warp_token_;
  const GemmPlan& plan_;
};

/// First unit of a block, and the block that has a unit.
QN_DEV int64_t first_unit(int64_t units, int64_t blocks, int64_t block) {
  return units * block / blocks;
}
QN_DEV int64_t block_of(int64_t units, int64_t blocks, int64_t unit) {
  return ((unit + 1) * blocks - 1) / units;
}

/// A block's part of a tile lies at slot 2 * block, or 2 * block + 1 when it starts the tile.
QN_DEV float* partial_of(const GemmArgs& args, const GemmPlan& plan, int64_t block,
                         bool starts_tile) {
  return args.workspace + (2 * block + starts_tile) * (plan.tile_tokens * kRows);
}

template <class Weight, int Tokens>
__global__ __launch_bounds__(GemmShape<Weight, Tokens>::kThreads) void gemm_kernel(GemmArgs args,
                                                                                   GemmPlan plan) {
  GemmBlock<Weight, Tokens> block(args, plan,
                                  shared_as<typename GemmShape<Weight, Tokens>::Shared>());
  const int64_t units = static_cast<int64_t>(plan.token_tiles) * plan.row_tiles * plan.col_tiles;
  const int64_t end = first_unit(units, plan.blocks, blockIdx.x + 1);
  for (int64_t unit = first_unit(units, plan.blocks, blockIdx.x); unit < end;) {
    const int64_t tile = unit / plan.col_tiles;
    const int col_begin = static_cast<int>(unit % plan.col_tiles);
    const int64_t left = end - tile * plan.col_tiles;
    const int col_end = left < plan.col_tiles ? static_cast<int>(left) : plan.col_tiles;
    const Segment segment{tile % plan.token_tiles * Tokens, tile / plan.token_tiles * kRows,
                          col_begin, col_end};
    block.multiply(segment);
    if (col_end - col_begin == plan.col_tiles)
      block.store_results(segment);
    else
      block.store_partial(segment, partial_of(args, plan, blockIdx.x, col_begin == 0));
    unit = tile * plan.col_tiles + col_end;
  }
}

/// gemm_plan.cu: the launch shape, and the kernel that sums the parts of shared tiles.
GemmPlan pick(const GemmArgs& args, const DeviceInfo& device);
int merge_gemm(const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream);

template <class Weight, int Tokens>
int launch_gemm(const char* name, const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  using Shape = GemmShape<Weight, Tokens>;
  const int error =
      launch(name, gemm_kernel<Weight, Tokens>, dim3(plan.blocks), dim3(Shape::kThreads),
             sizeof(typename Shape::Shared), stream, args, plan);
  if (error != 0 || !plan.split) return error;
  return merge_gemm(args, plan, stream);
}

template <class Weight>
int run_gemm(const char* name, const GemmArgs& args, const GemmPlan& plan, cudaStream_t stream) {
  if (args.tokens == 0) return 0;
  if (plan.tile_tokens == 16) return launch_gemm<Weight, 16>(name, args, plan, stream);
  if (plan.tile_tokens == 64) return launch_gemm<Weight, 64>(name, args, plan, stream);
  return launch_gemm<Weight, 128>(name, args, plan, stream);
}

template <class Weight>
int run_gemm(const char* name, const GemmArgs& args, const DeviceInfo& device,
             cudaStream_t stream) {
  return run_gemm<Weight>(name, args, pick(args, device), stream);
}

}  // namespace qn::cuda
