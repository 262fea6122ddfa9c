#include <algorithm>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_operand(const char* name, const TensorView& tensor) {
  QN_CHECK(tensor.rank == 2 && tensor.dtype == DType::BF16, "[matmul] ", name, " is ",
           tensor.describe(), ", expected a bf16 matrix");
  check_dense_rows("matmul", name, tensor);
}

}  // namespace

bool has_matmul() { return cpu::active_cpu_kernels().matmul != nullptr; }

void matmul(const TensorView& out, const TensorView& a, bool a_transposed, const TensorView& b,
            bool b_transposed, const TensorView* bias, bool add, const ExecContext& context) {
  const cpu::CpuKernels& kernels = cpu::active_cpu_kernels();
  QN_CHECK(context.gpu != nullptr || kernels.matmul != nullptr, "[matmul] the active level is ",
           isa_name(cpu::active_isa()), ", expected amx");
  check_operand("a", a);
  check_operand("b", b);
  const int64_t m = a.shape[a_transposed ? 1 : 0], k = a.shape[a_transposed ? 0 : 1];
  const int64_t n = b.shape[b_transposed ? 0 : 1];
  QN_CHECK(b.shape[b_transposed ? 1 : 0] == k, "[matmul] b is ", b.describe(), ", expected ", k,
           " elements along its ", b_transposed ? "second" : "first", " axis as a has");
  check_float("matmul", "out", out);
  QN_CHECK(out.rank == 2 && out.shape[0] == m && out.shape[1] == n, "[matmul] out is ",
           out.describe(), ", expected [", m, ", ", n, "]");
  check_dense_rows("matmul", "out", out);
  if (bias != nullptr) check_vector("matmul", "bias", *bias, DType::BF16, n);
  if (m == 0 || n == 0) return;
  if (context.gpu != nullptr)
    return cuda::matmul(out, a, a_transposed, b, b_transposed, bias, add, context);
  MatmulArgs args{};
  args.out = out.data;
  args.a = a.as<const bf16>();
  args.b = b.as<const bf16>();
  args.bias = bias != nullptr ? bias->as<const bf16>() : nullptr;
  args.m = m;
  args.n = n;
  args.k = k;
  args.out_stride = out.stride[0];
  args.a_stride = a.stride[0];
  args.b_stride = b.stride[0];
  args.dtype = out.dtype;
  args.a_transposed = a_transposed;
  args.b_transposed = b_transposed;
  args.add = add;
  // A streams through every unit, so they are wide; as many for each thread, and at least two.
  const int64_t threads = context.pool.threads();
  const int64_t share = std::max<int64_t>(ceil_div(n, kMatmulColumns * threads), 2);
  args.columns =
      std::clamp<int64_t>(ceil_div(ceil_div(n, share * threads), 32) * 32, 64, kMatmulColumns);
  const int64_t units = ceil_div(n, args.columns);
  // Every block of rows packs B anew. In one pass there are no sums to keep, so it may be large.
  const bool one_pass = k <= kMatmulDepth;
  const int64_t most_rows =
      std::min(ceil_div(m, 32) * 32, one_pass ? kMatmulRowsInOnePass : kMatmulRows);
  const int64_t most_depth = std::clamp<int64_t>(ceil_div(k, 32) * 32, 32, kMatmulPackedDepth);

  const Workspace::Scope scope(context.workspace);
  args.packed_a = context.workspace.allocate_array<bf16>(most_rows * most_depth);
  if (k > most_depth) {
    args.partial = context.workspace.allocate_array<float>(units * args.columns * most_rows);
  }
  const int64_t scratch_bytes = matmul_scratch(one_pass ? 0 : most_rows, args.columns);
  auto* scratch =
      static_cast<char*>(context.workspace.allocate(static_cast<size_t>(threads * scratch_bytes)));
  for (args.first_row = 0; args.first_row < m; args.first_row += args.rows) {
    args.rows = std::min(m - args.first_row, most_rows);
    // Once even without any depth, for the bias.
    for (args.first_depth = 0; args.first_depth < std::max<int64_t>(k, 1);
         args.first_depth += std::max<int64_t>(args.depth, 1)) {
      args.depth = std::min(k - args.first_depth, most_depth);
      context.pool.parallel_for(ceil_div(args.rows, 32), 1, [&](int64_t begin, int64_t end, int) {
        kernels.matmul_pack(args, begin, end);
      });
      context.pool.parallel_for(units, 1, [&](int64_t begin, int64_t end, int thread) {
        kernels.matmul(args, begin, end, scratch + thread * scratch_bytes);
      });
    }
  }
}

}  // namespace qn::ops
