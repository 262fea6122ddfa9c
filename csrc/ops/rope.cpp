#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {
namespace {

void check_angles(const char* name, const TensorView& angles, const TensorView& x) {
  QN_CHECK(angles.rank == 2 && angles.dtype == DType::F32 && angles.shape[0] == x.shape[0] &&
               2 * angles.shape[1] <= x.shape[2],
           "[rope] ", name, " is ", angles.describe(), ", expected f32[", x.shape[0], ", at most ",
           x.shape[2] / 2, "]");
  check_dense_rows("rope", name, angles);
}

}  // namespace

void rope(const TensorView& x, const TensorView& cos, const TensorView& sin,
          const ExecContext& context) {
  QN_CHECK(x.rank == 3, "[rope] x has rank ", x.rank, ", expected 3");
  check_float("rope", "x", x);
  check_dense_rows("rope", "x", x);
  check_angles("cos", cos, x);
  check_angles("sin", sin, x);
  check_same_shape("rope", "sin", sin, "cos", cos);
  RopeArgs args{};
  args.x = x.data;
  args.cos = cos.as<float>();
  args.sin = sin.as<float>();
  args.heads = x.shape[1];
  args.half = cos.shape[1];
  args.token_stride = x.stride[0];
  args.head_stride = x.stride[1];
  args.cos_stride = cos.stride[0];
  args.sin_stride = sin.stride[0];
  args.dtype = x.dtype;
  if (context.gpu != nullptr) return cuda::rope(args, x.shape[0], context);
  const auto kernel = cpu::active_cpu_kernels().rope;
  constexpr int64_t kTokensPerChunk = 4;
  context.pool.parallel_for(x.shape[0], kTokensPerChunk,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
}

}  // namespace qn::ops
