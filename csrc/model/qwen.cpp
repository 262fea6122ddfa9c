#include "model/qwen.h"

#include <cmath>

namespace qn::model {
namespace {

TensorView vector_view(const float* data, int64_t size) {
  return TensorView(const_cast<float*>(data), DType::F32, {size});
}

}  // namespace

ops::Batch BatchPlan::batch() const {
  const auto view = [](const auto& values, DType dtype, std::initializer_list<int64_t> shape) {
    return TensorView(const_cast<void*>(static_cast<const void*>(values.data())), dtype, shape);
  };
  ops::Batch batch;
  const int64_t half = static_cast<int64_t>(cos.size()) / tokens();
  batch.token_ids = view(token_ids, DType::I32, {tokens()});
  batch.cos = view(cos, DType::F32, {tokens(), half});
  batch.sin = view(sin, DType::F32, {tokens(), half});
  if (!query_scale.empty()) batch.query_scale = view(query_scale, DType::F32, {tokens()});
  batch.output_rows = view(output_rows, DType::I32, {static_cast<int64_t>(output_rows.size())});
  batch.spans = spans;
  return batch;
}

void QwenModel::forward(const TensorView& hidden, const ops::Batch& batch,
                        std::span<const ops::KvLayer> kv_layers, bool exact,
                        const ExecContext& context) const {
  const ModelConfig& c = config_;
  const int64_t tokens = batch.tokens();
  const float eps = static_cast<float>(c.rms_norm_eps);
  const DType dtype = context.activation_dtype();
  Workspace::Scope scratch(context.workspace);
  const auto buffer = [&](int64_t cols) {
    const size_t bytes = static_cast<size_t>(tokens * cols) * dtype_size(dtype);
    return TensorView(context.workspace.allocate(bytes), dtype, {tokens, cols});
  };
  const TensorView x = buffer(c.hidden_size);  // the residual stream
  const TensorView normed = buffer(c.hidden_size);
  const TensorView qkv = buffer(c.query_width() + 2 * c.kv_width());
  const TensorView attended = buffer(c.query_width());
  const auto query_heads = [&](const TensorView& rows) {
    TensorView view(rows.data, dtype, {tokens, c.num_heads, c.head_dim});
    view.stride[0] = rows.stride[0];
    return view;
  };

  const auto norm = [&](const float* weight) {
    ops::rms_norm(normed, x, vector_view(weight, c.hidden_size), eps, nullptr, context);
  };
  const auto linear = [&](const TensorView& out, const TensorView& in, const Linear& layer,
                          ops::Epilogue epilogue) {
    ops::linear(out, in, layer.segments, epilogue, invariant_ || exact, context);
  };

  ops::gather(x, batch.token_ids, weights_->embedding(), context);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const LayerWeights& w = weights_->layers()[static_cast<size_t>(i)];
    ops::KvLayer kv = kv_layers[static_cast<size_t>(i)];
    if (kv.dtype == DType::I8) kv.key_scale = w.key_scale;

    norm(w.input_norm);
    linear(qkv, normed, w.qkv, ops::Epilogue::Store);
    ops::append_qkv(qkv, {w.qkv_bias, w.q_norm, w.k_norm, eps}, kv, batch, context);
    ops::attention(query_heads(attended), query_heads(qkv), kv, batch,
                   1.0f / std::sqrt(static_cast<float>(c.head_dim)), c.window_of_layer(i), context);
    linear(x, attended, w.o_proj, ops::Epilogue::Add);

    norm(w.post_attention_norm);
    ops::mlp(x, normed, w.mlp, invariant_ || exact, context);
  }

  const WeightFormat rows = dtype == DType::F32 ? WeightFormat::F32 : WeightFormat::BF16;
  ops::gather(hidden, batch.output_rows, {x.data, rows, tokens, c.hidden_size, c.hidden_size},
              context);
  ops::rms_norm(hidden, hidden, vector_view(weights_->final_norm(), c.hidden_size), eps, nullptr,
                context);
}

void QwenModel::logits(const TensorView& logits, const TensorView& hidden, bool exact,
                       const ExecContext& context) const {
  ops::linear(logits, hidden, weights_->lm_head().segments, ops::Epilogue::Store,
              invariant_ || exact, context);
}

}  // namespace qn::model
