#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {

void swiglu(const TensorView& out, const TensorView& gate, const TensorView& up,
            const ExecContext& context) {
  QN_CHECK(gate.rank == 2, "[swiglu] gate has rank ", gate.rank, ", expected 2");
  check_float("swiglu", "gate", gate);
  check_same_shape("swiglu", "up", up, "gate", gate);
  check_same_shape("swiglu", "out", out, "gate", gate);
  check_dense_rows("swiglu", "gate", gate);
  check_dense_rows("swiglu", "up", up);
  check_dense_rows("swiglu", "out", out);
  SwigluArgs args{};
  args.out = out.data;
  args.gate = gate.data;
  args.up = up.data;
  args.inter = gate.shape[1];
  args.out_stride = out.stride[0];
  args.gate_stride = gate.stride[0];
  args.up_stride = up.stride[0];
  args.dtype = gate.dtype;
  if (context.gpu != nullptr) return cuda::swiglu(args, gate.shape[0], context);
  const int64_t blocks_per_row = (args.inter + kSwigluBlock - 1) / kSwigluBlock;
  const auto kernel = cpu::active_cpu_kernels().swiglu;
  constexpr int64_t kBlocksPerChunk = 4;
  context.pool.parallel_for(gate.shape[0] * blocks_per_row, kBlocksPerChunk,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
}

}  // namespace qn::ops
