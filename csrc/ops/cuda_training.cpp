#include <cmath>

#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/gpu.h"

namespace qn::ops {

void linear_xent(const TensorView& log_prob, const TensorView& hidden, const TensorView& weight,
                 const TensorView& targets, float scale, const LinearXentGrads* grads,
                 int64_t chunk_tokens, const ExecContext& context) {
  constexpr const char* kOp = "linear_xent";
  QN_CHECK(context.gpu != nullptr, "[linear_xent] hidden is on the CPU, expected a GPU");
  QN_CHECK(hidden.rank == 2 && weight.rank == 2 && hidden.shape[1] == weight.shape[1],
           "[linear_xent] hidden is ", hidden.describe(), " and weight ", weight.describe(),
           ", expected [tokens, cols] and [vocab, cols]");
  const int64_t tokens = hidden.shape[0], vocab = weight.shape[0];
  QN_CHECK(vocab % 8 == 0 && vocab > 0, "[linear_xent] weight is ", weight.describe(),
           ", expected a multiple of 8 rows");
  check_vector(kOp, "log_prob", log_prob, DType::F32, tokens);
  check_vector(kOp, "targets", targets, DType::I32, tokens);
  QN_CHECK(std::isfinite(scale) && scale > 0, "[linear_xent] scale is ", scale,
           ", expected a positive number");
  QN_CHECK(chunk_tokens > 0, "[linear_xent] chunk_tokens is ", chunk_tokens,
           ", expected at least 1");
  qn::cuda::LinearXentArgs args{};
  args.log_prob = log_prob.as<float>();
  args.hidden = hidden.data;
  args.weight = weight.data;
  args.targets = targets.as<const int32_t>();
  args.tokens = tokens;
  args.vocab = vocab;
  args.cols = hidden.shape[1];
  args.chunk_tokens = chunk_tokens;
  args.hidden_stride = cuda::chunked_rows(kOp, "hidden", hidden, DType::BF16);
  args.weight_stride = cuda::chunked_rows(kOp, "weight", weight, DType::BF16);
  args.scale = scale;
  if (grads != nullptr) {
    check_vector(kOp, "grad", *grads->log_prob, DType::F32, tokens);
    args.grad = grads->log_prob->as<const float>();
    if (grads->hidden != nullptr) {
      check_same_shape(kOp, "dhidden", *grads->hidden, "hidden", hidden);
      args.dhidden = grads->hidden->data;
      args.dhidden_stride = cuda::chunked_rows(kOp, "dhidden", *grads->hidden, DType::BF16);
    }
    if (grads->weight != nullptr) {
      const TensorView& dweight = *grads->weight;
      check_float(kOp, "dweight", dweight);
      TensorView as_weight = weight;
      as_weight.dtype = dweight.dtype;
      check_same_shape(kOp, "dweight", dweight, "weight", as_weight);
      args.dweight = dweight.data;
      args.dweight_stride = cuda::chunked_rows(kOp, "dweight", dweight, dweight.dtype);
      args.dweight_dtype = dweight.dtype;
    }
  }
  if (tokens == 0) return;
  const Workspace::Scope scope(context.workspace);
  const qn::cuda::Device& device = cuda::device_of(*context.gpu);
  const int64_t bytes = device.launchers().linear_xent_workspace(&args, &device.device_info());
  args.workspace = context.workspace.allocate(static_cast<size_t>(bytes));
  device.check(device.launchers().linear_xent(&args, &device.device_info(), device.stream()),
               "run linear_xent");
}

namespace cuda {
namespace {

using qn::cuda::DocumentAttentionArgs;

/// Returns the elements between tokens.
int64_t check_heads(const char* op, const char* name, const TensorView& tensor) {
  QN_CHECK(tensor.dtype == DType::BF16, "[", op, "] ", name, " is ", dtype_name(tensor.dtype),
           ", expected bf16 on a GPU");
  if (tensor.size() == 0) return 0;
  QN_CHECK(reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.stride[0] % 8 == 0 &&
               (tensor.shape[1] == 1 || tensor.stride[1] == tensor.shape[2]),
           "[", op, "] ", name, " has strides ", tensor.stride[0], " and ", tensor.stride[1],
           " or an address that is no multiple of 16, expected tokens a multiple of 8 elements "
           "apart and heads of ",
           tensor.shape[2], " side by side on a GPU");
  return tensor.stride[0];
}

DocumentAttentionArgs attention_args(const char* op, const TensorView& out, const TensorView& lse,
                                     const TensorView& q, const TensorView& k, const TensorView& v,
                                     const TensorView& cu_seqlens,
                                     const PackedAttentionOptions& options) {
  const int64_t head_dim = q.shape[2];
  QN_CHECK(head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128, "[", op,
           "] head_dim is ", head_dim, ", expected 64, 80, 96 or 128 on a GPU");
  DocumentAttentionArgs args{};
  args.out = out.data;
  args.lse = lse.as<float>();
  args.q = q.data;
  args.k = k.data;
  args.v = v.data;
  args.begins = cu_seqlens.as<const int32_t>();
  args.tokens = q.shape[0];
  args.out_stride = check_heads(op, "out", out);
  args.q_stride = check_heads(op, "q", q);
  args.k_stride = check_heads(op, "k", k);
  args.v_stride = check_heads(op, "v", v);
  args.documents = static_cast<int32_t>(cu_seqlens.shape[0] - 1);
  // How long the longest is only the GPU knows; blocks behind a document's end return at once.
  args.max_length = static_cast<int32_t>(q.shape[0]);
  args.num_heads = static_cast<int32_t>(q.shape[1]);
  args.num_kv_heads = static_cast<int32_t>(k.shape[1]);
  args.head_dim = static_cast<int32_t>(head_dim);
  args.window = static_cast<int32_t>(options.window);
  args.scale = options.scale;
  return args;
}

}  // namespace

void rms_norm_bwd(const RmsNormBwdArgs& args, const ExecContext& context) {
  constexpr int64_t kMaxCols = 8192;
  QN_CHECK(args.cols <= kMaxCols, "[rms_norm_bwd] x has ", args.cols, " columns, expected at most ",
           kMaxCols, " on a GPU");
  context.gpu->check(launchers(context).rms_norm_bwd(&args, context.gpu->stream()),
                     "run rms_norm_bwd");
}

void rope(const RopeArgs& args, int64_t tokens, const ExecContext& context) {
  context.gpu->check(launchers(context).rope_pairs(&args, tokens, false, context.gpu->stream()),
                     "run rope");
}

void swiglu_bwd(const SwigluBwdArgs& args, int64_t tokens, const ExecContext& context) {
  context.gpu->check(launchers(context).swiglu_bwd(&args, tokens, context.gpu->stream()),
                     "run swiglu_bwd");
}

void softmax_xent(const SoftmaxXentArgs& args, int64_t rows, const ExecContext& context) {
  context.gpu->check(launchers(context).softmax_xent(&args, rows, context.gpu->stream()),
                     "run softmax_xent");
}

void adamw(const AdamwArgs& args, const ExecContext& context) {
  context.gpu->check(launchers(context).adamw(&args, context.gpu->stream()), "run adamw");
}

void packed_attention(const TensorView& out, const TensorView& lse, const TensorView& q,
                      const TensorView& k, const TensorView& v, const TensorView& cu_seqlens,
                      const PackedAttentionOptions& options, const ExecContext& context) {
  const DocumentAttentionArgs args =
      attention_args("packed_attention", out, lse, q, k, v, cu_seqlens, options);
  context.gpu->check(launchers(context).packed_attention(&args, context.gpu->stream()),
                     "run packed_attention");
}

void packed_attention_bwd(const TensorView& dq, const TensorView& dk, const TensorView& dv,
                          const PackedAttentionPass& pass, const PackedAttentionOptions& options,
                          const ExecContext& context) {
  constexpr const char* kOp = "packed_attention_bwd";
  const Workspace::Scope scope(context.workspace);
  DocumentAttentionArgs args =
      attention_args(kOp, pass.out, pass.lse, pass.q, pass.k, pass.v, pass.cu_seqlens, options);
  args.dout = pass.dout.data;
  args.dq = dq.data;
  args.dk = dk.data;
  args.dv = dv.data;
  args.dout_stride = check_heads(kOp, "dout", pass.dout);
  args.dq_stride = check_heads(kOp, "dq", dq);
  args.dk_stride = check_heads(kOp, "dk", dk);
  args.dv_stride = check_heads(kOp, "dv", dv);
  args.delta = context.workspace.allocate_array<float>(pass.lse.size());
  context.gpu->check(launchers(context).packed_attention_bwd(&args, context.gpu->stream()),
                     "run packed_attention_bwd");
}

void matmul(const TensorView& out, const TensorView& a, bool a_transposed, const TensorView& b,
            bool b_transposed, const TensorView* bias, bool add, const ExecContext& context) {
  constexpr const char* kOp = "matmul";
  QN_CHECK(!a_transposed || !b_transposed,
           "[matmul] a_transposed and b_transposed are both true, expected at most one on a GPU");
  qn::cuda::GemmArgs args{};
  args.out = out.data;
  args.x = a.data;
  args.weight = b.data;
  args.bias = bias != nullptr ? bias->data : nullptr;
  args.tokens = out.shape[0];
  args.rows = out.shape[1];
  args.cols = a.shape[a_transposed ? 0 : 1];
  QN_CHECK(args.cols > 0, "[matmul] a is ", a.describe(), ", expected elements to sum on a GPU");
  args.out_stride = out.stride[0];
  args.x_stride = chunked_rows(kOp, "a", a, DType::BF16);
  args.weight_stride = chunked_rows(kOp, "b", b, DType::BF16);
  args.out_dtype = out.dtype;
  args.add = add;
  const qn::cuda::Launchers& call = launchers(context);
  run_gemm(kOp,
           b_transposed   ? call.gemm_bf16
           : a_transposed ? call.gemm_weight_grad
                          : call.gemm_input_grad,
           args, context);
}

}  // namespace cuda
}  // namespace qn::ops
