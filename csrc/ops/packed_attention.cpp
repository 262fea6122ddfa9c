#include <algorithm>
#include <cmath>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {
namespace {

void check_heads(const char* op, const char* name, const TensorView& tensor) {
  QN_CHECK(tensor.rank == 3, "[", op, "] ", name, " is ", tensor.describe(),
           ", expected [tokens, heads, head_dim]");
  check_float(op, name, tensor);
  check_dense_rows(op, name, tensor);
}

void check_like(const char* op, const char* name, const TensorView& tensor, const char* other_name,
                const TensorView& other) {
  check_same_shape(op, name, tensor, other_name, other);
  check_dense_rows(op, name, tensor);
}

PackedStrides strides_of(const TensorView& tensor) { return {tensor.stride[0], tensor.stride[1]}; }

void check_forward(const char* op, const TensorView& out, const TensorView& lse,
                   const TensorView& q, const TensorView& k, const TensorView& v,
                   const TensorView& cu_seqlens, const PackedAttentionOptions& options) {
  check_heads(op, "q", q);
  check_heads(op, "k", k);
  check_like(op, "v", v, "k", k);
  check_like(op, "out", out, "q", q);
  const int64_t tokens = q.shape[0], num_heads = q.shape[1], head_dim = q.shape[2];
  QN_CHECK(k.dtype == q.dtype && k.shape[0] == tokens && k.shape[2] == head_dim, "[", op, "] k is ",
           k.describe(), ", expected ", dtype_name(q.dtype), "[", tokens, ", heads, ", head_dim,
           "] as q");
  QN_CHECK(k.shape[1] > 0 && num_heads > 0 && num_heads % k.shape[1] == 0, "[", op, "] q has ",
           num_heads, " heads, expected a multiple of the ", k.shape[1], " kv heads");
  QN_CHECK(head_dim > 0 && head_dim <= kAttentionMaxHeadDim, "[", op, "] head_dim is ", head_dim,
           ", expected 1 to ", kAttentionMaxHeadDim);
  QN_CHECK(lse.rank == 2 && lse.dtype == DType::F32 && lse.contiguous() &&
               lse.shape[0] == num_heads && lse.shape[1] == tokens,
           "[", op, "] lse is ", lse.describe(), ", expected dense f32[", num_heads, ", ", tokens,
           "]");
  QN_CHECK(std::isfinite(options.scale) && options.scale > 0, "[", op, "] scale is ", options.scale,
           ", expected a positive number");
  QN_CHECK(options.window >= 0, "[", op, "] window is ", options.window, ", expected at least 0");
  QN_CHECK(cu_seqlens.rank == 1 && cu_seqlens.dtype == DType::I32 && cu_seqlens.contiguous() &&
               cu_seqlens.shape[0] > 0,
           "[", op, "] cu_seqlens is ", cu_seqlens.describe(),
           ", expected dense i32[documents + 1]");
}

/// The arguments of both directions; `length` becomes that of the longest document.
PackedAttentionArgs common_args(const char* op, const TensorView& out, const TensorView& lse,
                                const TensorView& q, const TensorView& k, const TensorView& v,
                                const TensorView& cu_seqlens, const PackedAttentionOptions& options,
                                Workspace& workspace, int64_t& item_count, int64_t& length) {
  const int64_t tokens = q.shape[0], num_heads = q.shape[1], head_dim = q.shape[2];
  const int32_t* ends = cu_seqlens.as<const int32_t>();
  const int64_t documents = cu_seqlens.shape[0] - 1;
  QN_CHECK(ends[0] == 0 && ends[documents] == tokens, "[", op, "] cu_seqlens goes from ", ends[0],
           " to ", ends[documents], ", expected 0 to the ", tokens, " tokens");
  for (int64_t i = 0; i < documents; ++i) {
    QN_CHECK(ends[i] <= ends[i + 1], "[", op, "] cu_seqlens[", i + 1, "] is ", ends[i + 1],
             ", expected at least the ", ends[i], " before it");
  }
  PackedAttentionArgs args{};
  args.out = out.data;
  args.lse = lse.as<float>();
  args.q = q.data;
  args.k = k.data;
  args.v = v.data;
  args.out_strides = strides_of(out);
  args.q_strides = strides_of(q);
  args.k_strides = strides_of(k);
  args.v_strides = strides_of(v);
  args.tokens = tokens;
  args.num_kv_heads = k.shape[1];
  args.group = num_heads / k.shape[1];
  args.head_dim = head_dim;
  args.window = options.window;
  args.scale = options.scale;
  args.dtype = q.dtype;
  auto* items = workspace.allocate_array<PackedAttentionItem>(documents * num_heads);
  item_count = length = 0;
  for (int64_t i = 0; i < documents; ++i) {
    if (ends[i] == ends[i + 1]) continue;
    length = std::max<int64_t>(length, ends[i + 1] - ends[i]);
    for (int64_t head = 0; head < num_heads; ++head) {
      items[item_count++] = {ends[i], ends[i + 1] - ends[i], head};
    }
  }
  // The longest documents first, so that the threads finish together.
  std::sort(items, items + item_count,
            [](const auto& a, const auto& b) { return a.length > b.length; });
  args.items = items;
  return args;
}

using Kernel = void (*)(const PackedAttentionArgs&, int64_t, int64_t, void*);

void run_items(Kernel kernel, const PackedAttentionArgs& args, int64_t item_count,
               int64_t scratch_bytes, const ExecContext& context) {
  scratch_bytes = (scratch_bytes + 63) / 64 * 64;
  auto* scratch = static_cast<char*>(
      context.workspace.allocate(static_cast<size_t>(context.pool.threads() * scratch_bytes)));
  context.pool.parallel_for(item_count, 1, [&](int64_t begin, int64_t end, int thread) {
    kernel(args, begin, end, scratch + thread * scratch_bytes);
  });
}

}  // namespace

void packed_attention(const TensorView& out, const TensorView& lse, const TensorView& q,
                      const TensorView& k, const TensorView& v, const TensorView& cu_seqlens,
                      const PackedAttentionOptions& options, const ExecContext& context) {
  check_forward("packed_attention", out, lse, q, k, v, cu_seqlens, options);
  if (context.gpu != nullptr)
    return cuda::packed_attention(out, lse, q, k, v, cu_seqlens, options, context);
  const Workspace::Scope scope(context.workspace);
  int64_t item_count, length;
  const PackedAttentionArgs args = common_args("packed_attention", out, lse, q, k, v, cu_seqlens,
                                               options, context.workspace, item_count, length);
  run_items(cpu::active_cpu_kernels().packed_attention, args, item_count,
            packed_attention_scratch(length, args.head_dim), context);
}

void packed_attention_bwd(const TensorView& dq, const TensorView& dk, const TensorView& dv,
                          const PackedAttentionPass& pass, const PackedAttentionOptions& options,
                          const ExecContext& context) {
  constexpr const char* kOp = "packed_attention_bwd";
  check_forward(kOp, pass.out, pass.lse, pass.q, pass.k, pass.v, pass.cu_seqlens, options);
  check_like(kOp, "dout", pass.dout, "q", pass.q);
  check_like(kOp, "dq", dq, "q", pass.q);
  check_like(kOp, "dk", dk, "k", pass.k);
  check_like(kOp, "dv", dv, "k", pass.k);
  if (context.gpu != nullptr) return cuda::packed_attention_bwd(dq, dk, dv, pass, options, context);
  const Workspace::Scope scope(context.workspace);
  int64_t item_count, length;
  PackedAttentionArgs args =
      common_args(kOp, pass.out, pass.lse, pass.q, pass.k, pass.v, pass.cu_seqlens, options,
                  context.workspace, item_count, length);
  args.dout = pass.dout.data;
  args.dq = dq.data;
  args.dk = dk.data;
  args.dv = dv.data;
  args.dout_strides = strides_of(pass.dout);
  args.dq_strides = strides_of(dq);
  args.dk_strides = strides_of(dk);
  args.dv_strides = strides_of(dv);
  args.dk_share = context.workspace.allocate_array<float>(pass.q.size());
  args.dv_share = context.workspace.allocate_array<float>(pass.q.size());
  const cpu::CpuKernels& kernels = cpu::active_cpu_kernels();
  run_items(kernels.packed_attention_bwd, args, item_count,
            packed_attention_bwd_scratch(length, args.head_dim), context);
  constexpr int64_t kTokensPerChunk = 16;
  context.pool.parallel_for(args.tokens, kTokensPerChunk, [&](int64_t begin, int64_t end, int) {
    kernels.packed_attention_bwd_sum(args, begin, end);
  });
}

}  // namespace qn::ops
