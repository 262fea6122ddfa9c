#include <algorithm>
#include <variant>
#include <vector>

#include "core/cpu_info.h"
#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/folded.h"
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

template <class Args>
struct Kernel {
  void (*run)(const Args&, int64_t begin, int64_t end);
  Args args;
};

/// A segment's kernel and where its units of work start in the common list.
struct Job {
  std::variant<Kernel<GemmFloatArgs>, Kernel<GemmQuantizedArgs>, Kernel<GemmFoldedArgs>> kernel;
  int64_t first_unit;
  int64_t end_unit;
};

/// The forms of x that the segments ask for, each made once, and the scratch memory per thread.
class Inputs {
 public:
  Inputs(const TensorView& x, const ExecContext& context)
      : x_(x), tokens_(x.shape[0]), cols_(x.shape[1]), context_(context) {}

  const cpu::CpuKernels& kernels() const { return kernels_; }
  int64_t scratch_bytes() const { return scratch_bytes_; }
  int threads() const { return context_.pool.threads(); }

  void* packed_bf16() {
    const GemmWorkspace needed = kernels_.gemm_bf16_workspace(tokens_, cols_);
    scratch_bytes_ = std::max(scratch_bytes_, needed.per_thread);
    if (packed_bf16_ != nullptr || needed.packed_x == 0) return packed_bf16_;
    GemmFloatArgs pack{};
    pack.x = x_.as<float>();
    pack.x_stride = x_.stride[0];
    pack.tokens = tokens_;
    pack.cols = cols_;
    packed_bf16_ = pack.packed_x =
        context_.workspace.allocate(static_cast<size_t>(needed.packed_x));
    for_token_tiles(
        [&](int64_t begin, int64_t end) { kernels_.gemm_bf16_pack_x(pack, begin, end); });
    return packed_bf16_;
  }

  QuantizedActivations quantized() {
    scratch_bytes_ = std::max(scratch_bytes_, cpu::gemm_quantized_scratch(cols_));
    if (quantized_.codes != nullptr) return quantized_;
    const int64_t groups = tokens_ * group_count(cols_) + cpu::kTokenTile;
    quantized_.codes = context_.workspace.allocate_array<int8_t>(groups * kGroupSize);
    quantized_.scale = context_.workspace.allocate_array<float>(groups);
    quantized_.negative_sum = context_.workspace.allocate_array<int32_t>(groups);
    quantized_.scaled_sum = context_.workspace.allocate_array<float>(groups);
    quantized_.tokens = tokens_;
    const QuantizeActivationsArgs args{quantized_, x_.as<float>(), cols_, x_.stride[0]};
    context_.pool.parallel_for(tokens_, cpu::kTokenTile, [&](int64_t begin, int64_t end, int) {
      kernels_.quantize_activations(args, begin, end);
    });
    return quantized_;
  }

  FoldedActivations folded(int64_t block_cols) {
    scratch_bytes_ = std::max(scratch_bytes_, cpu::gemm_folded_scratch(cols_, tokens_));
    for (const FoldedActivations& made : folded_) {
      if (made.block_cols == block_cols) return made;
    }
    return folded_.emplace_back(fold(x_, block_cols, context_));
  }

 private:
  int64_t token_tiles() const { return (tokens_ + cpu::kTokenTile - 1) / cpu::kTokenTile; }

  template <class Fn>
  void for_token_tiles(Fn&& fn) {
    context_.pool.parallel_for(token_tiles(), 1,
                               [&](int64_t begin, int64_t end, int) { fn(begin, end); });
  }

  const TensorView& x_;
  int64_t tokens_, cols_;
  const ExecContext& context_;
  const cpu::CpuKernels& kernels_ = cpu::active_cpu_kernels();
  int64_t scratch_bytes_ = 0;
  void* packed_bf16_ = nullptr;
  QuantizedActivations quantized_{};
  std::vector<FoldedActivations> folded_;
};

/// What the three families of arguments have in common.
template <class Args>
Args common_args(const TensorView& out, const LinearSegment& segment, Epilogue epilogue) {
  Args args{};
  args.out = out.as<float>() + segment.out_offset;
  args.weight = segment.weight.data;
  args.bias = static_cast<const float*>(segment.bias);
  args.rows = segment.weight.rows;
  args.cols = segment.weight.cols;
  args.out_stride = out.stride[0];
  args.add = epilogue == Epilogue::Add;
  return args;
}

GemmFoldedArgs folded_args(const TensorView& out, const FoldedActivations& x,
                           const LinearSegment& segment, Epilogue epilogue, int threads) {
  auto args = common_args<GemmFoldedArgs>(out, segment, epilogue);
  args.streams = memory_streams();
  args.x = x;
  args.format = segment.weight.format;
  args.chunk_tokens = folded_chunk_tokens(x.tokens, panel_count(args.rows), threads);
  return args;
}

/// Chunks of tokens x panels.
int64_t folded_units(const GemmFoldedArgs& args) {
  return chunk_count(args.x.tokens, args.chunk_tokens) * panel_count(args.rows);
}

/// The job of one segment, its units counted from `unit`.
Job make_job(const TensorView& out, const TensorView& x, const LinearSegment& segment,
             Epilogue epilogue, bool invariant, Inputs& inputs, int64_t unit) {
  const cpu::CpuKernels& kernels = inputs.kernels();
  const WeightFormat format = segment.weight.format;
  const int64_t tokens = x.shape[0], panels = panel_count(segment.weight.rows);
  if (!is_quantized(format)) {
    const bool narrow = format == WeightFormat::BF16;
    auto args = common_args<GemmFloatArgs>(out, segment, epilogue);
    args.x = x.as<float>();
    args.x_stride = x.stride[0];
    args.tokens = tokens;
    args.weight_stride = segment.weight.row_stride;
    if (narrow) args.packed_x = inputs.packed_bf16();
    return {Kernel<GemmFloatArgs>{narrow ? kernels.gemm_bf16 : kernels.gemm_f32, args}, unit,
            unit + panels};
  }
  const bool tiles = takes_folded(segment.weight, tokens, invariant);
  if (tiles || format == WeightFormat::Int8) {
    const int64_t block_cols =
        format == WeightFormat::Int8 ? int8_block_cols(x.shape[1]) : kFoldedBlockCols;
    const GemmFoldedArgs args =
        folded_args(out, inputs.folded(block_cols), segment, epilogue, inputs.threads());
    if (!tiles) return {Kernel<GemmFoldedArgs>{kernels.gemm_int8, args}, unit, unit + panels};
    return {Kernel<GemmFoldedArgs>{kernels.gemm_folded, args}, unit, unit + folded_units(args)};
  }
  auto args = common_args<GemmQuantizedArgs>(out, segment, epilogue);
  args.x = inputs.quantized();
  args.format = format;
  args.streams = memory_streams();
  return {Kernel<GemmQuantizedArgs>{
              format == WeightFormat::Int8Grouped ? kernels.gemm_int8_grouped : kernels.gemm_int4,
              args},
          unit, unit + panels};
}

/// Units per chunk: up to four chunks per thread, but no thread with more units than fewer chunks
/// would give it.
int64_t balanced_chunk(int64_t units, int threads) {
  int64_t best = units, least = units + 1;
  for (int64_t per_thread = 4; per_thread >= 1; --per_thread) {
    const int64_t chunk = (units + threads * per_thread - 1) / (threads * per_thread);
    const int64_t chunks = (units + chunk - 1) / chunk;
    const int64_t longest = (chunks + threads - 1) / threads * chunk;
    if (longest < least) {
      least = longest;
      best = chunk;
    }
  }
  return best;
}

/// The same for few tokens, which read panels as fast as memory gives them: the last chunks of a
/// long matrix may be as short as the panels that are walked side by side.
int64_t streamed_chunk(int64_t units, int threads) {
  constexpr int64_t kSideBySide = 4, kLong = 32;
  return units < kLong * threads ? balanced_chunk(units, threads) : kSideBySide;
}

}  // namespace

void linear(const TensorView& out, const TensorView& x, std::span<const LinearSegment> segments,
            Epilogue epilogue, bool invariant, const ExecContext& context) {
  constexpr const char* kOp = "linear";
  const DType dtype = context.activation_dtype();
  QN_CHECK(x.rank == 2 && x.dtype == dtype, "[linear] x is ", x.describe(), ", expected ",
           dtype_name(dtype), "[tokens, cols]");
  QN_CHECK(out.rank == 2 && (out.dtype == DType::F32 || out.dtype == dtype) &&
               out.shape[0] == x.shape[0],
           "[linear] out is ", out.describe(), ", expected ", dtype_name(dtype), "[", x.shape[0],
           ", rows]");
  check_dense_rows(kOp, "x", x);
  check_dense_rows(kOp, "out", out);
  for (size_t i = 0; i < segments.size(); ++i) check_segment(out, x, segments[i], i);
  check_disjoint(segments);
  if (x.shape[0] == 0) return;
  if (context.gpu != nullptr) return cuda::linear(out, x, segments, epilogue, invariant, context);

  const Workspace::Scope scope(context.workspace);
  Inputs inputs(x, context);
  std::vector<Job> jobs;
  jobs.reserve(segments.size());
  int64_t units = 0;
  for (const LinearSegment& segment : segments) {
    jobs.push_back(make_job(out, x, segment, epilogue, invariant, inputs, units));
    units = jobs.back().end_unit;
  }
  if (units == 0) return;
  const int64_t scratch_bytes = (inputs.scratch_bytes() + 63) / 64 * 64;
  const int threads = context.pool.threads();
  char* scratch = context.workspace.allocate_array<char>(scratch_bytes * threads);

  constexpr int64_t kStreamedTokens = 8;  // fewer read as fast as memory gives
  const int64_t grain = x.shape[0] < kStreamedTokens ? streamed_chunk(units, threads)
                                                     : balanced_chunk(units, threads);
  context.pool.parallel_for(units, grain, [&](int64_t begin, int64_t end, int thread) {
    for (const Job& job : jobs) {
      const int64_t first = std::max(begin, job.first_unit), last = std::min(end, job.end_unit);
      if (first >= last) continue;
      std::visit(
          [&](const auto& kernel) {
            auto args = kernel.args;
            args.scratch = scratch + thread * scratch_bytes;
            kernel.run(args, first - job.first_unit, last - job.first_unit);
          },
          job.kernel);
    }
  });
}

double token_cost() {
  switch (cpu::active_isa()) {
    case Isa::Scalar:
      return 1.0;
    case Isa::Avx2:
      return 0.4;
    default:
      return memory_streams() == 2 ? 0.1 : 0.3;
  }
}

void linear_folded(const TensorView& out, const FoldedActivations& x, const LinearSegment& segment,
                   Epilogue epilogue, const ExecContext& context) {
  const int threads = context.pool.threads();
  const GemmFoldedArgs args = folded_args(out, x, segment, epilogue, threads);
  const int64_t units = folded_units(args);
  const int64_t scratch_bytes = cpu::gemm_folded_scratch(args.cols, x.tokens);
  char* scratch = context.workspace.allocate_array<char>(scratch_bytes * threads);
  const auto kernel = cpu::active_cpu_kernels().gemm_folded;
  context.pool.parallel_for(units, balanced_chunk(units, threads),
                            [&](int64_t begin, int64_t end, int thread) {
                              GemmFoldedArgs mine = args;
                              mine.scratch = scratch + thread * scratch_bytes;
                              kernel(mine, begin, end);
                            });
}

}  // namespace qn::ops
