#include "model/qwen.h"

#include <cmath>
#include <cstring>

namespace qn::model {
namespace {

/// The columns [begin, begin + heads * head_dim) of every row of x, as [tokens, heads, head_dim].
TensorView heads_of(const TensorView& x, int64_t begin, int64_t heads, int64_t head_dim) {
  TensorView view(x.as<float>() + begin, DType::F32, {x.shape[0], heads, head_dim});
  view.stride = {x.stride[0], head_dim, 1, 0};
  return view;
}

TensorView vector_view(const float* data, int64_t size) {
  return TensorView(const_cast<float*>(data), DType::F32, {size});
}

/// RMSNorm of every head on its own.
void norm_heads(const TensorView& x, const float* weight, float eps, const ExecContext& context) {
  for (int64_t head = 0; head < x.shape[1]; ++head) {
    TensorView one(x.as<float>() + head * x.stride[1], DType::F32, {x.shape[0], x.shape[2]});
    one.stride[0] = x.stride[0];
    ops::rms_norm(one, one, vector_view(weight, x.shape[2]), eps, nullptr, context);
  }
}

}  // namespace

void QwenModel::forward(const BatchPlan& plan, std::span<const ops::KvLayer> kv_layers,
                        float* hidden, const ExecContext& context) const {
  const ModelConfig& c = config_;
  const int64_t tokens = plan.tokens();
  const float eps = static_cast<float>(c.rms_norm_eps);
  Workspace::Scope scratch(context.workspace);
  const auto buffer = [&](int64_t cols) {
    return TensorView(context.workspace.allocate_array<float>(tokens * cols), DType::F32,
                      {tokens, cols});
  };
  const TensorView x = buffer(c.hidden_size);  // the residual stream
  const TensorView normed = buffer(c.hidden_size);
  const TensorView qkv = buffer(c.query_width() + 2 * c.kv_width());
  const TensorView attended = buffer(c.query_width());

  const TensorView q = heads_of(qkv, 0, c.num_heads, c.head_dim);
  const TensorView k = heads_of(qkv, c.query_width(), c.num_kv_heads, c.head_dim);
  const TensorView v = heads_of(qkv, c.query_width() + c.kv_width(), c.num_kv_heads, c.head_dim);
  const TensorView attended_heads = heads_of(attended, 0, c.num_heads, c.head_dim);
  const TensorView ids(const_cast<int32_t*>(plan.token_ids.data()), DType::I32, {tokens});
  const TensorView cos(const_cast<float*>(plan.cos.data()), DType::F32, {tokens, c.rope_dim / 2});
  const TensorView sin(const_cast<float*>(plan.sin.data()), DType::F32, {tokens, c.rope_dim / 2});

  const auto norm = [&](const float* weight) {
    ops::rms_norm(normed, x, vector_view(weight, c.hidden_size), eps, nullptr, context);
  };
  const auto linear = [&](const TensorView& out, const TensorView& in, const Linear& layer,
                          ops::Epilogue epilogue) {
    ops::linear(out, in, layer.segments, epilogue, invariant_ || plan.exact, context);
  };

  ops::gather(x, ids, weights_->embedding(), context);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const LayerWeights& w = weights_->layers()[static_cast<size_t>(i)];
    ops::KvLayer kv = kv_layers[static_cast<size_t>(i)];
    if (kv.dtype == DType::I8 && !w.key_scale.empty()) kv.key_scale = w.key_scale.data();

    norm(w.input_norm);
    linear(qkv, normed, w.qkv, ops::Epilogue::Store);
    if (c.qk_norm) {
      norm_heads(q, w.q_norm, eps, context);
      norm_heads(k, w.k_norm, eps, context);
    }
    ops::rope(q, cos, sin, context);
    ops::rope(k, cos, sin, context);
    ops::kv_append(kv, k, v, plan.spans, context);
    const ops::AttentionOptions options{
        1.0f / std::sqrt(static_cast<float>(c.head_dim)), c.window_of_layer(i),
        plan.query_scale.empty() ? nullptr : plan.query_scale.data()};
    ops::attention(attended_heads, q, kv, plan.spans, options, context);
    linear(x, attended, w.o_proj, ops::Epilogue::Add);

    norm(w.post_attention_norm);
    ops::mlp(x, normed, w.mlp, invariant_ || plan.exact, context);
  }

  const int64_t rows = static_cast<int64_t>(plan.output_rows.size());
  const TensorView out(hidden, DType::F32, {rows, c.hidden_size});
  for (int64_t row = 0; row < rows; ++row) {
    const float* source =
        x.as<float>() + plan.output_rows[static_cast<size_t>(row)] * c.hidden_size;
    std::memcpy(hidden + row * c.hidden_size, source,
                static_cast<size_t>(c.hidden_size) * sizeof(float));
  }
  ops::rms_norm(out, out, vector_view(weights_->final_norm(), c.hidden_size), eps, nullptr,
                context);
}

void QwenModel::logits(float* logits, const float* hidden, int64_t rows, bool exact,
                       const ExecContext& context) const {
  const TensorView in(const_cast<float*>(hidden), DType::F32, {rows, config_.hidden_size});
  const TensorView out(logits, DType::F32, {rows, config_.vocab_size});
  ops::linear(out, in, weights_->lm_head().segments, ops::Epilogue::Store, invariant_ || exact,
              context);
}

}  // namespace qn::model
