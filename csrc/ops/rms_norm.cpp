#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {

void rms_norm(const TensorView& out, const TensorView& x, const TensorView& weight, float eps,
              const TensorView* residual, const ExecContext& context) {
  constexpr const char* kOp = "rms_norm";
  QN_CHECK(x.rank == 2, "[rms_norm] x has rank ", x.rank, ", expected 2");
  check_float(kOp, "x", x);
  check_float(kOp, "weight", weight);
  check_same_shape(kOp, "out", out, "x", x);
  check_dense_rows(kOp, "x", x);
  check_dense_rows(kOp, "out", out);
  QN_CHECK(weight.rank == 1 && weight.contiguous() && weight.shape[0] == x.shape[1],
           "[rms_norm] weight is ", weight.describe(), ", expected ", x.shape[1],
           " dense elements");
  if (residual != nullptr) {
    check_same_shape(kOp, "residual", *residual, "x", x);
    check_dense_rows(kOp, "residual", *residual);
  }
  RmsNormArgs args{};
  args.out = out.data;
  args.x = x.data;
  args.residual = residual != nullptr ? residual->data : nullptr;
  args.weight = weight.data;
  args.cols = x.shape[1];
  args.out_stride = out.stride[0];
  args.x_stride = x.stride[0];
  args.residual_stride = residual != nullptr ? residual->stride[0] : 0;
  args.eps = eps;
  args.dtype = x.dtype;
  args.weight_dtype = weight.dtype;
  if (context.gpu != nullptr) return cuda::rms_norm(args, x.shape[0], context);
  const auto kernel = cpu::active_cpu_kernels().rms_norm;
  constexpr int64_t kRowsPerChunk = 8;
  context.pool.parallel_for(x.shape[0], kRowsPerChunk,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
}

}  // namespace qn::ops
