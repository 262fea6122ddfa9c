#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {

void swiglu_bwd(const TensorView& dgate, const TensorView& dup, const TensorView& dout,
                const TensorView& gate, const TensorView& up, const ExecContext& context) {
  QN_CHECK(gate.rank == 2, "[swiglu_bwd] gate has rank ", gate.rank, ", expected 2");
  check_float("swiglu_bwd", "gate", gate);
  check_dense_rows("swiglu_bwd", "gate", gate);
  const auto check_like_gate = [&](const char* name, const TensorView& tensor) {
    check_same_shape("swiglu_bwd", name, tensor, "gate", gate);
    check_dense_rows("swiglu_bwd", name, tensor);
  };
  check_like_gate("up", up);
  check_like_gate("dout", dout);
  check_like_gate("dgate", dgate);
  check_like_gate("dup", dup);
  SwigluBwdArgs args{};
  args.dgate = dgate.data;
  args.dup = dup.data;
  args.dout = dout.data;
  args.gate = gate.data;
  args.up = up.data;
  args.inter = gate.shape[1];
  args.dgate_stride = dgate.stride[0];
  args.dup_stride = dup.stride[0];
  args.dout_stride = dout.stride[0];
  args.gate_stride = gate.stride[0];
  args.up_stride = up.stride[0];
  args.dtype = gate.dtype;
  if (context.gpu != nullptr) return cuda::swiglu_bwd(args, gate.shape[0], context);
  const int64_t blocks_per_row = (args.inter + kSwigluBlock - 1) / kSwigluBlock;
  const auto kernel = cpu::active_cpu_kernels().swiglu_bwd;
  constexpr int64_t kBlocksPerChunk = 4;
  context.pool.parallel_for(gate.shape[0] * blocks_per_row, kBlocksPerChunk,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
}

}  // namespace qn::ops
