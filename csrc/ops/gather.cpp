#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {

void gather(const TensorView& out, const TensorView& ids, const WeightView& table,
            const ExecContext& context) {
  QN_CHECK(ids.rank == 1 && ids.dtype == DType::I32, "[gather] ids is ", ids.describe(),
           ", expected i32[tokens]");
  QN_CHECK(out.rank == 2 && out.dtype == context.activation_dtype() &&
               out.shape[0] == ids.shape[0] && out.shape[1] == table.cols,
           "[gather] out is ", out.describe(), ", expected ",
           dtype_name(context.activation_dtype()), "[", ids.shape[0], ", ", table.cols, "]");
  check_dense_rows("gather", "out", out);
  if (context.gpu != nullptr) return cuda::gather(out, ids, table, context);
  for (int64_t token = 0; token < ids.shape[0]; ++token) {
    const int32_t id = ids.as<int32_t>()[token * ids.stride[0]];
    QN_CHECK(id >= 0 && id < table.rows, "[gather] ids[", token, "] is ", id, ", expected 0 to ",
             table.rows - 1);
  }
  GatherArgs args{};
  args.out = out.as<float>();
  args.ids = ids.as<int32_t>();
  args.table = table;
  args.out_stride = out.stride[0];
  args.ids_stride = ids.stride[0];
  const auto kernel = cpu::active_cpu_kernels().gather;
  constexpr int64_t kTokensPerChunk = 8;
  context.pool.parallel_for(ids.shape[0], kTokensPerChunk,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
}

}  // namespace qn::ops
