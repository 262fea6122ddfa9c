#include <cmath>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {
namespace {

void check_dense(const char* name, const TensorView& tensor, const TensorView& master) {
  bool same = tensor.rank == master.rank && tensor.contiguous();
  for (int axis = 0; same && axis < tensor.rank; ++axis) {
    same = tensor.shape[axis] == master.shape[axis];
  }
  QN_CHECK(same, "[adamw] ", name, " is ", tensor.describe(),
           ", expected dense elements in the shape of master, ", master.describe());
}

void check_f32(const char* name, const TensorView& tensor) {
  QN_CHECK(tensor.dtype == DType::F32, "[adamw] ", name, " is ", dtype_name(tensor.dtype),
           ", expected f32");
}

}  // namespace

void adamw(const TensorView& master, const TensorView& mean, const TensorView& square,
           const TensorView& grad, const TensorView* parameter, const AdamwOptions& options,
           const ExecContext& context) {
  check_f32("master", master);
  check_f32("mean", mean);
  check_f32("square", square);
  check_float("adamw", "grad", grad);
  check_dense("master", master, master);
  check_dense("mean", mean, master);
  check_dense("square", square, master);
  check_dense("grad", grad, master);
  if (parameter != nullptr) {
    QN_CHECK(parameter->dtype == DType::BF16, "[adamw] parameter is ", dtype_name(parameter->dtype),
             ", expected bf16");
    check_dense("parameter", *parameter, master);
  }
  QN_CHECK(options.step >= 1, "[adamw] step is ", options.step, ", expected at least 1");
  const auto check_beta = [](const char* name, double beta) {
    QN_CHECK(beta >= 0 && beta < 1, "[adamw] ", name, " is ", beta, ", expected 0 to below 1");
  };
  check_beta("beta1", options.beta1);
  check_beta("beta2", options.beta2);
  AdamwArgs args{};
  args.master = master.as<float>();
  args.mean = mean.as<float>();
  args.square = square.as<float>();
  args.parameter = parameter != nullptr ? parameter->as<bf16>() : nullptr;
  args.grad = grad.data;
  args.n = master.size();
  args.grad_scale = static_cast<float>(options.grad_scale);
  // In double: 1 - beta would lose the digits that a float beta has not got.
  const auto correction = [&](double beta) {
    return 1 - std::pow(beta, static_cast<double>(options.step));
  };
  args.beta1 = static_cast<float>(options.beta1);
  args.rest1 = static_cast<float>(1 - options.beta1);
  args.beta2 = static_cast<float>(options.beta2);
  args.rest2 = static_cast<float>(1 - options.beta2);
  args.eps = static_cast<float>(options.eps);
  args.keep = static_cast<float>(1 - options.rate * options.weight_decay);
  args.rate = static_cast<float>(options.rate / correction(options.beta1));
  args.correction2 = static_cast<float>(1 / correction(options.beta2));
  args.grad_dtype = grad.dtype;
  if (context.gpu != nullptr) return cuda::adamw(args, context);
  const auto kernel = cpu::active_cpu_kernels().adamw;
  context.pool.parallel_for((args.n + kAdamwBlock - 1) / kAdamwBlock, 1,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
}

}  // namespace qn::ops
