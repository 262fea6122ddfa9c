#include <algorithm>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/ops.h"

namespace qn::ops {
namespace {

void check_segment(const TensorView& out, const TensorView& x, const LinearSegment& segment,
                   size_t index) {
  const WeightView& weight = segment.weight;
  QN_CHECK(weight.rows >= 0 && weight.cols == x.shape[1], "[linear] weight ", index, " is [",
           weight.rows, ", ", weight.cols, "], expected x's ", x.shape[1], " columns");
  QN_CHECK(segment.out_offset >= 0 && segment.out_offset <= out.shape[1] - weight.rows,
           "[linear] weight ", index, " writes columns ", segment.out_offset, " to ",
           segment.out_offset + weight.rows, ", expected at most ", out.shape[1], " as out has");
  QN_CHECK(is_quantized(weight.format) || weight.rows <= 1 || weight.row_stride >= weight.cols,
           "[linear] weight ", index, " has row stride ", weight.row_stride,
           ", expected at least its ", weight.cols, " columns");
}

void check_disjoint(std::span<const LinearSegment> segments) {
  for (size_t i = 0; i < segments.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const LinearSegment &a = segments[i], &b = segments[j];
      QN_CHECK(a.out_offset + a.weight.rows <= b.out_offset ||
                   b.out_offset + b.weight.rows <= a.out_offset,
               "[linear] weights ", j, " and ", i,
               " write the same columns of out, expected disjoint ranges");
    }
  }
}

/// A segment's kernel and where its row blocks start in the common list of work.
struct Job {
  void (*kernel)(const GemmFloatArgs&, int64_t begin, int64_t end);
  GemmFloatArgs args;
  int64_t first_block;
  int64_t end_block;
};

GemmFloatArgs float_args(const TensorView& out, const TensorView& x, const LinearSegment& segment,
                         Epilogue epilogue) {
  GemmFloatArgs args{};
  args.out = out.as<float>() + segment.out_offset;
  args.x = x.as<float>();
  args.weight = segment.weight.data;
  args.bias = segment.bias;
  args.tokens = x.shape[0];
  args.rows = segment.weight.rows;
  args.cols = x.shape[1];
  args.out_stride = out.stride[0];
  args.x_stride = x.stride[0];
  args.weight_stride = segment.weight.row_stride;
  args.add = epilogue == Epilogue::Add;
  return args;
}

}  // namespace

void linear(const TensorView& out, const TensorView& x, std::span<const LinearSegment> segments,
            Epilogue epilogue, bool /*invariant*/, const ExecContext& context) {
  constexpr const char* kOp = "linear";
  QN_CHECK(x.rank == 2 && x.dtype == DType::F32, "[linear] x is ", x.describe(),
           ", expected f32[tokens, cols]");
  QN_CHECK(out.rank == 2 && out.dtype == DType::F32 && out.shape[0] == x.shape[0],
           "[linear] out is ", out.describe(), ", expected f32[", x.shape[0], ", rows]");
  check_dense_rows(kOp, "x", x);
  check_dense_rows(kOp, "out", out);
  const int64_t tokens = x.shape[0], cols = x.shape[1];
  const cpu::CpuKernels& kernels = cpu::active_cpu_kernels();
  const Workspace::Scope scope(context.workspace);

  std::vector<Job> jobs;
  int64_t blocks = 0;
  bool has_bf16 = false;
  for (size_t i = 0; i < segments.size(); ++i) {
    const LinearSegment& segment = segments[i];
    check_segment(out, x, segment, i);
    const WeightFormat format = segment.weight.format;
    QN_CHECK(!is_quantized(format), "[linear] weight ", i, " is quantised, expected f32 or bf16");
    has_bf16 = has_bf16 || format == WeightFormat::BF16;
    const int64_t end_block = blocks + panel_count(segment.weight.rows);
    jobs.push_back({format == WeightFormat::BF16 ? kernels.gemm_bf16 : kernels.gemm_f32,
                    float_args(out, x, segment, epilogue), blocks, end_block});
    blocks = end_block;
  }
  check_disjoint(segments);
  if (tokens == 0) return;

  // Each form of x is made once for all segments.
  const GemmWorkspace needed =
      has_bf16 ? kernels.gemm_bf16_workspace(tokens, cols) : GemmWorkspace{};
  if (needed.packed_x > 0) {
    GemmFloatArgs pack{};
    pack.x = x.as<float>();
    pack.x_stride = x.stride[0];
    pack.tokens = tokens;
    pack.cols = cols;
    pack.packed_x = context.workspace.allocate(static_cast<size_t>(needed.packed_x));
    context.pool.parallel_for(
        (tokens + cpu::kTokenTile - 1) / cpu::kTokenTile, 1,
        [&](int64_t begin, int64_t end, int) { kernels.gemm_bf16_pack_x(pack, begin, end); });
    for (Job& job : jobs) job.args.packed_x = pack.packed_x;
  }
  char* scratch = nullptr;
  if (needed.per_thread > 0) {
    scratch = context.workspace.allocate_array<char>(needed.per_thread * context.pool.threads());
  }

  context.pool.parallel_for(blocks, 1, [&](int64_t begin, int64_t end, int thread) {
    for (const Job& job : jobs) {
      const int64_t first = std::max(begin, job.first_block), last = std::min(end, job.end_block);
      if (first >= last) continue;
      GemmFloatArgs args = job.args;
      args.scratch = scratch + thread * needed.per_thread;
      job.kernel(args, first - job.first_block, last - job.first_block);
    }
  });
}

}  // namespace qn::ops
