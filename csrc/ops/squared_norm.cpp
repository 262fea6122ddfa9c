#include <numeric>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/ops.h"

namespace qn::ops {

double squared_norm(const TensorView& x, const ExecContext& context) {
  check_float("squared_norm", "x", x);
  QN_CHECK(x.contiguous(), "[squared_norm] x is ", x.describe(), " with gaps, expected it dense");
  SquaredNormArgs args{};
  args.x = x.data;
  args.n = x.size();
  args.dtype = x.dtype;
  const int64_t blocks = (args.n + kSquaredNormBlock - 1) / kSquaredNormBlock;
  const Workspace::Scope scope(context.workspace);
  args.partial = context.workspace.allocate_array<double>(blocks);
  const auto kernel = cpu::active_cpu_kernels().squared_norm;
  constexpr int64_t kBlocksPerChunk = 16;
  context.pool.parallel_for(blocks, kBlocksPerChunk,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
  return std::accumulate(args.partial, args.partial + blocks, 0.0);
}

}  // namespace qn::ops
