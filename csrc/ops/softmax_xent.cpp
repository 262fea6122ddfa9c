#include <cmath>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {

void softmax_xent(const TensorView& log_prob, const TensorView& logits, const TensorView& targets,
                  float scale, const TensorView* grad, const ExecContext& context) {
  QN_CHECK(logits.rank == 2 && logits.shape[1] > 0, "[softmax_xent] logits is ", logits.describe(),
           ", expected [rows, vocab], vocab at least 1");
  check_float("softmax_xent", "logits", logits);
  check_dense_rows("softmax_xent", "logits", logits);
  const int64_t rows = logits.shape[0];
  check_vector("softmax_xent", "log_prob", log_prob, DType::F32, rows);
  check_vector("softmax_xent", "targets", targets, DType::I32, rows);
  if (grad != nullptr) check_vector("softmax_xent", "grad", *grad, DType::F32, rows);
  QN_CHECK(std::isfinite(scale) && scale > 0, "[softmax_xent] scale is ", scale,
           ", expected a positive number");
  SoftmaxXentArgs args{};
  args.log_prob = log_prob.as<float>();
  args.logits = logits.data;
  args.targets = targets.as<const int32_t>();
  args.grad = grad != nullptr ? grad->as<const float>() : nullptr;
  args.vocab = logits.shape[1];
  args.logits_stride = logits.stride[0];
  args.scale = scale;
  args.dtype = logits.dtype;
  if (context.gpu != nullptr) return cuda::softmax_xent(args, rows, context);
  for (int64_t row = 0; row < rows; ++row) {
    QN_CHECK(args.targets[row] >= -1 && args.targets[row] < args.vocab, "[softmax_xent] targets[",
             row, "] is ", args.targets[row], ", expected -1 to ", args.vocab - 1);
  }
  const auto kernel = cpu::active_cpu_kernels().softmax_xent;
  context.pool.parallel_for(rows, 1,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
}

}  // namespace qn::ops
