// How linear and mlp use the kernels for weights with one scale per row: when, with which
// activations and chunks. Internal.
#pragma once
#include "core/context.h"
#include "core/tensor.h"
#include "kernels/args.h"
#include "ops/ops.h"

namespace qn::ops {

/// Columns that share a scale beside folded 4-bit weights: those of a norm's output, and those of
/// an MLP's inner activations, whose outliers reach further.
constexpr int64_t kFoldedBlockCols = 1024;
constexpr int64_t kGatedBlockCols = 512;

/// Columns that share a scale beside Int8 weights: near kInt8BlockCols, the same number in all
/// blocks as far as whole tiles allow. A function of cols alone, so that a row's result is one of
/// the row alone.
int64_t int8_block_cols(int64_t cols);

/// Whether the active level multiplies this weight with gemm_folded.
bool takes_folded(const WeightView& weight, int64_t tokens, bool invariant);

FoldedActivations allocate_folded(int64_t tokens, int64_t cols, int64_t block_cols,
                                  const ExecContext& context);

/// x [tokens, cols] f32, last axis dense.
FoldedActivations fold(const TensorView& x, int64_t block_cols, const ExecContext& context);

/// Tokens of a chunk, a multiple of 32: all of them up to a limit, fewer where
/// `units_per_chunk` units of work a chunk leave threads without.
int64_t folded_chunk_tokens(int64_t tokens, int64_t units_per_chunk, int threads);

constexpr int64_t chunk_count(int64_t tokens, int64_t chunk_tokens) {
  return (tokens + chunk_tokens - 1) / chunk_tokens;
}

/// `linear` with one weight that takes gemm_folded and x folded already; out has been checked.
void linear_folded(const TensorView& out, const FoldedActivations& x, const LinearSegment& segment,
                   Epilogue epilogue, const ExecContext& context);

}  // namespace qn::ops
