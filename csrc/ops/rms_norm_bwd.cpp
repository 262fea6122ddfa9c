#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {

void rms_norm_bwd(const TensorView& dx, const TensorView& dweight, const TensorView& dy,
                  const TensorView& x, const TensorView& weight, float eps,
                  const TensorView* residual_grad, const ExecContext& context) {
  constexpr const char* kOp = "rms_norm_bwd";
  QN_CHECK(x.rank == 2, "[rms_norm_bwd] x has rank ", x.rank, ", expected 2");
  check_float(kOp, "x", x);
  check_float(kOp, "weight", weight);
  check_same_shape(kOp, "dy", dy, "x", x);
  check_same_shape(kOp, "dx", dx, "x", x);
  check_dense_rows(kOp, "x", x);
  check_dense_rows(kOp, "dy", dy);
  check_dense_rows(kOp, "dx", dx);
  QN_CHECK(weight.rank == 1 && weight.contiguous() && weight.shape[0] == x.shape[1],
           "[rms_norm_bwd] weight is ", weight.describe(), ", expected ", x.shape[1],
           " dense elements");
  check_same_shape(kOp, "dweight", dweight, "weight", weight);
  check_dense_rows(kOp, "dweight", dweight);
  if (residual_grad != nullptr) {
    check_same_shape(kOp, "residual_grad", *residual_grad, "x", x);
    check_dense_rows(kOp, "residual_grad", *residual_grad);
  }
  const Workspace::Scope scope(context.workspace);
  RmsNormBwdArgs args{};
  args.rows = x.shape[0];
  args.cols = x.shape[1];
  const int64_t blocks = (args.rows + kNormBlock - 1) / kNormBlock;
  args.dx = dx.data;
  args.dweight = dweight.data;
  args.partial = context.workspace.allocate_array<float>(blocks * args.cols);
  args.dy = dy.data;
  args.x = x.data;
  args.residual_grad = residual_grad != nullptr ? residual_grad->data : nullptr;
  args.weight = weight.data;
  args.dx_stride = dx.stride[0];
  args.dy_stride = dy.stride[0];
  args.x_stride = x.stride[0];
  args.residual_stride = residual_grad != nullptr ? residual_grad->stride[0] : 0;
  args.eps = eps;
  args.dtype = x.dtype;
  args.weight_dtype = weight.dtype;
  if (context.gpu != nullptr) return cuda::rms_norm_bwd(args, context);
  const cpu::CpuKernels& kernels = cpu::active_cpu_kernels();
  context.pool.parallel_for(
      blocks, 1, [&](int64_t begin, int64_t end, int) { kernels.rms_norm_bwd(args, begin, end); });
  context.pool.parallel_for(
      (args.cols + kReduceBlock - 1) / kReduceBlock, 1,
      [&](int64_t begin, int64_t end, int) { kernels.rms_norm_bwd_weight(args, begin, end); });
}

}  // namespace qn::ops
