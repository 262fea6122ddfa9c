#include "ops/folded.h"

#include <algorithm>

#include "core/cpu_info.h"
#include "kernels/cpu/dispatch.h"

namespace qn::ops {
namespace {

/// More tokens a chunk only lengthen what one unit of work takes.
constexpr int64_t kMostChunkTokens = 1024;

/// Wider blocks make the tiles wait less for float work, narrower ones keep more of the small
/// activations beside large ones (docs/NUMERICS.md).
constexpr int64_t kInt8BlockCols = 512;

/// From this many tokens on, 4-bit weights are faster unpacked to folded ones than with the exact
/// kernel: measured on a Xeon, and on Zen 4, where the levels from avx512 on multiply what they
/// have loaded before they unpack it again.
constexpr int64_t kInt4FoldedTokens = 8, kInt4FoldedTokensOfTwoStreams = 32;

/// From this many tokens on, gemm_folded is faster than gemm_int8, where memory_streams is 4 (a
/// Xeon with AMX) and where it is 2 (Zen 4).
constexpr int64_t kInt8FoldedTokens = 6, kInt8FoldedTokensOfTwoStreams = 96;

}  // namespace

int64_t folded_tokens() {
  const bool exact_is_fast = memory_streams() == 2 && cpu::active_isa() >= Isa::Avx512;
  return exact_is_fast ? kInt4FoldedTokensOfTwoStreams : kInt4FoldedTokens;
}

bool takes_folded(const WeightView& weight, int64_t tokens, bool invariant) {
  if (weight.cols == 0 || cpu::active_cpu_kernels().gemm_folded == nullptr) return false;
  switch (weight.format) {
    case WeightFormat::Int8:
      return tokens >= (memory_streams() == 2 ? kInt8FoldedTokensOfTwoStreams : kInt8FoldedTokens);
    case WeightFormat::Int4:
    case WeightFormat::Int4Symmetric:
      return tokens >= folded_tokens() && !invariant;
    default:
      return false;
  }
}

int64_t int8_block_cols(int64_t cols) {
  const int64_t blocks = std::max<int64_t>((cols + kInt8BlockCols - 1) / kInt8BlockCols, 1);
  return cpu::folded_cols(std::max<int64_t>((cols + blocks - 1) / blocks, 1));
}

FoldedActivations allocate_folded(int64_t tokens, int64_t cols, int64_t block_cols,
                                  const ExecContext& context) {
  constexpr int64_t kTile = cpu::kTokenTile * cpu::kFoldedTileCols;
  FoldedActivations out{nullptr, nullptr, nullptr, nullptr, tokens, block_cols};
  out.codes = context.workspace.allocate_array<int8_t>(tokens * cpu::folded_cols(cols) + kTile);
  out.scale = context.workspace.allocate_array<float>(tokens * out.blocks(cols));
  out.negative_sum = context.workspace.allocate_array<int32_t>(tokens * out.blocks(cols));
  out.group_sums =
      context.workspace.allocate_array<int16_t>(tokens * cpu::folded_cols(cols) / kGroupSize);
  return out;
}

FoldedActivations fold(const TensorView& x, int64_t block_cols, const ExecContext& context) {
  const int64_t tokens = x.shape[0], cols = x.shape[1];
  const FoldedActivations out = allocate_folded(tokens, cols, block_cols, context);
  const FoldActivationsArgs args{out, x.as<float>(), cols, x.stride[0]};
  const auto kernel = cpu::active_cpu_kernels().fold_activations;
  context.pool.parallel_for(tokens, cpu::kTokenTile,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
  return out;
}

int64_t folded_chunk_tokens(int64_t tokens, int64_t units_per_chunk, int threads) {
  constexpr int64_t kPair = 2 * cpu::kTokenTile;
  const int64_t needed = chunk_count(2 * threads, std::max<int64_t>(units_per_chunk, 1));
  const int64_t chunks = std::max(chunk_count(tokens, kMostChunkTokens), needed);
  const int64_t chunk = (tokens + chunks - 1) / chunks;
  return (chunk + kPair - 1) / kPair * kPair;
}

}  // namespace qn::ops
