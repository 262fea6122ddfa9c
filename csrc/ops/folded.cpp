#include "ops/folded.h"

#include <algorithm>

#include "kernels/cpu/dispatch.h"

namespace qn::ops {
namespace {

/// Folded activations of one pass over the weights; they and two unpacked panels stay in L2.
constexpr int64_t kFoldedChunkBytes = 1400 << 10;

}  // namespace

bool takes_folded(const WeightView& weight, int64_t tokens, bool invariant) {
  const bool four_bits =
      weight.format == WeightFormat::Int4 || weight.format == WeightFormat::Int4Symmetric;
  return four_bits && !invariant && tokens >= kFoldedTokens && weight.cols > 0 &&
         cpu::active_cpu_kernels().gemm_int4_folded != nullptr;
}

FoldedActivations allocate_folded(int64_t tokens, int64_t cols, int64_t block_cols,
                                  const ExecContext& context) {
  const int64_t padded = (tokens + cpu::kTokenTile - 1) / cpu::kTokenTile * cpu::kTokenTile;
  FoldedActivations out{nullptr, nullptr, tokens, block_cols};
  out.codes = context.workspace.allocate_array<int8_t>(padded * cpu::folded_cols(cols));
  out.scale = context.workspace.allocate_array<float>(padded * out.blocks(cols));
  return out;
}

FoldedActivations fold(const TensorView& x, int64_t block_cols, const ExecContext& context) {
  const int64_t tokens = x.shape[0], cols = x.shape[1];
  const FoldedActivations out = allocate_folded(tokens, cols, block_cols, context);
  const FoldActivationsArgs args{out, x.as<float>(), cols, x.stride[0]};
  const auto kernel = cpu::active_cpu_kernels().fold_activations;
  context.pool.parallel_for((tokens + cpu::kTokenTile - 1) / cpu::kTokenTile, 1,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
  return out;
}

int64_t folded_chunk_tokens(int64_t tokens, int64_t bytes_per_token) {
  constexpr int64_t kPair = 2 * cpu::kTokenTile;
  const int64_t fitting =
      std::max(kFoldedChunkBytes / std::max<int64_t>(bytes_per_token, 1), kPair);
  const int64_t chunks = chunk_count(tokens, fitting);
  return ((tokens + chunks - 1) / chunks + kPair - 1) / kPair * kPair;
}

}  // namespace qn::ops
