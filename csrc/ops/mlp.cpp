#include <algorithm>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/folded.h"
#include "ops/ops.h"

namespace qn::ops {
namespace {

/// Results of a block of columns that stay in L2 beside the weights, where these take several
/// passes.
constexpr int64_t kMostHeldTokens = 256;

/// silu(x gate^T) * (x up^T), folded for `down`.
FoldedActivations gated_folded(const TensorView& x, const MlpWeights& weights,
                               const ExecContext& context) {
  const WeightView &gate = weights.gate, &up = weights.up;
  const int64_t tokens = x.shape[0];
  const bool int8 = gate.format == WeightFormat::Int8 || up.format == WeightFormat::Int8;
  const int64_t out_block_cols =
      weights.down.format == WeightFormat::Int8 ? int8_block_cols(gate.rows) : kGatedBlockCols;
  GatedGemmFoldedArgs args{};
  args.out = allocate_folded(tokens, gate.rows, out_block_cols, context);
  args.gate = {gate.data, gate.format};
  args.up = {up.data, up.format};
  args.x = fold(x, int8 ? int8_block_cols(gate.cols) : kFoldedBlockCols, context);
  args.rows = gate.rows;
  args.cols = gate.cols;
  const int threads = context.pool.threads();
  const int64_t blocks = args.out.blocks(gate.rows);
  args.chunk_tokens = folded_chunk_tokens(tokens, blocks, threads);
  if (cpu::gated_held_tokens(gate.cols, args.chunk_tokens, out_block_cols) > kMostHeldTokens) {
    args.chunk_tokens = std::min(args.chunk_tokens, kMostHeldTokens);
  }
  const int64_t chunks = chunk_count(tokens, args.chunk_tokens);
  // The blocks left over when all threads have the same number, and the last one, which may be
  // narrow, are divided among the threads.
  args.whole_units = (blocks * chunks - 1) / threads * threads;
  args.pieces = args.chunk_tokens >= 64 * threads ? threads : 1;
  const int64_t units = args.whole_units + (blocks * chunks - args.whole_units) * args.pieces;
  const int64_t scratch_bytes =
      cpu::gated_gemm_folded_scratch(gate.cols, args.chunk_tokens, out_block_cols);
  char* scratch = context.workspace.allocate_array<char>(scratch_bytes * threads);
  const auto kernel = cpu::active_cpu_kernels().gated_gemm_folded;
  context.pool.parallel_for(units, 1, [&](int64_t begin, int64_t end, int thread) {
    GatedGemmFoldedArgs mine = args;
    mine.scratch = scratch + thread * scratch_bytes;
    kernel(mine, begin, end);
  });
  return args.out;
}

}  // namespace

void mlp(const TensorView& out, const TensorView& x, const MlpWeights& weights, bool invariant,
         const ExecContext& context) {
  constexpr const char* kOp = "mlp";
  const WeightView &gate = weights.gate, &up = weights.up, &down = weights.down;
  QN_CHECK(gate.rows == up.rows && gate.cols == up.cols, "[mlp] up is [", up.rows, ", ", up.cols,
           "], expected [", gate.rows, ", ", gate.cols, "] like gate");
  QN_CHECK(down.cols == gate.rows, "[mlp] down has ", down.cols, " columns, expected the ",
           gate.rows, " rows of gate");
  const DType dtype = context.activation_dtype();
  QN_CHECK(x.rank == 2 && x.dtype == dtype && x.shape[1] == gate.cols, "[mlp] x is ", x.describe(),
           ", expected ", dtype_name(dtype), "[tokens, ", gate.cols, "]");
  QN_CHECK(out.rank == 2 && out.dtype == dtype && out.shape[0] == x.shape[0] &&
               out.shape[1] == down.rows,
           "[mlp] out is ", out.describe(), ", expected ", dtype_name(dtype), "[", x.shape[0], ", ",
           down.rows, "]");
  check_dense_rows(kOp, "x", x);
  check_dense_rows(kOp, "out", out);
  const int64_t tokens = x.shape[0], inter = gate.rows;
  if (tokens == 0) return;
  const Workspace::Scope scope(context.workspace);
  const LinearSegment down_only[] = {{down, nullptr, 0}};
  if (context.gpu == nullptr && takes_folded(gate, tokens, invariant) &&
      takes_folded(up, tokens, invariant) && takes_folded(down, tokens, invariant)) {
    return linear_folded(out, gated_folded(x, weights, context), down_only[0], Epilogue::Add,
                         context);
  }
  const auto size = static_cast<int64_t>(dtype_size(dtype));
  const TensorView both(context.workspace.allocate_array<char>(tokens * 2 * inter * size), dtype,
                        {tokens, 2 * inter});
  const auto half = [&](int64_t begin) {
    TensorView view(both.as<char>() + begin * size, dtype, {tokens, inter});
    view.stride[0] = both.stride[0];
    return view;
  };
  const LinearSegment gate_up[] = {{gate, nullptr, 0}, {up, nullptr, inter}};
  linear(both, x, gate_up, Epilogue::Store, invariant, context);
  swiglu(half(0), half(0), half(inter), context);
  linear(out, half(0), down_only, Epilogue::Add, invariant, context);
}

}  // namespace qn::ops
