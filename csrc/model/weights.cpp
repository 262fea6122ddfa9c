#include "model/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"

namespace qn::model {
namespace {

constexpr size_t kArenaChunk =
    size_t{256} << 20;  // many tensors in one mapping, so that small ones get huge pages too
constexpr size_t kAlignment = 64;
constexpr size_t kPackBlock = size_t{4} << 20;  // bytes of a source tensor that are packed at once

bool used_in_place(WeightFormat format, SourceType source) {
  return (format == WeightFormat::F32 && source == SourceType::F32) ||
         (format == WeightFormat::BF16 && source == SourceType::BF16);
}

/// What an int8 KV cache divides keys by: sqrt(1 + (b / 8)^2), b the length of the bias in the pair
/// that RoPE rotates. Keys of Qwen2 have biases beyond 100 in a few channels, which would leave the
/// other channels of the token a handful of codes: without this the mean KL divergence of the demo
/// model is 0.016, with it 0.0005 (docs/NUMERICS.md).
std::vector<float> key_scale(const float* k_bias, const ModelConfig& c) {
  std::vector<float> scale(static_cast<size_t>(c.kv_width()));
  const int64_t half = c.rope_dim / 2;
  for (int64_t i = 0; i < c.kv_width(); ++i) {
    const int64_t dim = i % c.head_dim;
    const int64_t partner = dim < half ? i + half : dim < c.rope_dim ? i - half : i;
    const double other = partner == i ? 0.0 : k_bias[partner];
    scale[static_cast<size_t>(i)] =
        static_cast<float>(std::sqrt(1.0 + (k_bias[i] * double{k_bias[i]} + other * other) / 64));
  }
  return scale;
}

}  // namespace

bool is_vector(const std::string& name) {
  return name.ends_with("norm.weight") || name.ends_with(".bias");
}

/// "int4" keeps a Q4_0 source exactly, everything else follows the request.
WeightFormat choose_format(RequestedFormat requested, SourceType source, bool on_gpu) {
  if (!requested) {
    const WeightFormat native = native_format(source);
    return on_gpu && native == WeightFormat::F32 ? WeightFormat::BF16 : native;
  }
  if (*requested == WeightFormat::Int4 && (on_gpu || source == SourceType::Q4_0))
    return WeightFormat::Int4Symmetric;
  return *requested;
}

Weights::Weights(const ModelConfig& config, RequestedFormat requested,
                 std::shared_ptr<const Gpu> gpu)
    : config_(config), requested_(requested), gpu_(std::move(gpu)) {
  if (gpu_ != nullptr) upload_ = std::make_unique<GpuUpload>(gpu_);
}

const char* format_name(WeightFormat format) {
  switch (format) {
    case WeightFormat::F32:
      return "f32";
    case WeightFormat::BF16:
      return "bf16";
    case WeightFormat::Int8:
      return "int8";
    case WeightFormat::Int8Grouped:
      return "int8_grouped";
    case WeightFormat::Int4Symmetric:
      return "int4_symmetric";
    case WeightFormat::Int4:
      return "int4";
  }
  return "?";
}

WeightFormat native_format(SourceType source) {
  switch (source) {
    case SourceType::F32:
    case SourceType::F16:
      return WeightFormat::F32;
    case SourceType::BF16:
      return WeightFormat::BF16;
    case SourceType::Q4_0:
      return WeightFormat::Int4Symmetric;
    default:
      return WeightFormat::Int8Grouped;
  }
}

void* Weights::arena_allocate(size_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (arena_.empty() || arena_used_ + bytes > arena_.back().size()) {
    arena_.emplace_back(std::max(bytes, kArenaChunk));
    arena_used_ = 0;
  }
  void* result = static_cast<char*>(arena_.back().data()) + arena_used_;
  arena_used_ += bytes;
  return result;
}

void Weights::check_new(const std::string& name) const {
  QN_CHECK(!matrices_.count(name) && !vectors_.count(name), "[model] tensor ", name,
           " was given twice");
}

void Weights::add_packed(const PackedTensor& tensor) {
  check_new(tensor.name);
  const WeightView& view = tensor.view;
  QN_CHECK(reinterpret_cast<uintptr_t>(view.data) % kAlignment == 0, "[model] tensor ", tensor.name,
           " is not aligned to ", kAlignment, " bytes");
  if (is_vector(tensor.name)) {
    QN_CHECK(view.format == WeightFormat::F32 && view.rows == 1, "[model] tensor ", tensor.name,
             " is ", format_name(view.format), "[", view.rows, ", ", view.cols,
             "], expected an f32 vector");
    vectors_[tensor.name] = {static_cast<const float*>(view.data), view.cols};
    vector_owners_.push_back(tensor.owner);
  } else if (upload_ != nullptr) {
    const auto copy = [&view](void* out, int64_t first_row, int64_t rows) {
      const size_t begin = ops::weight_bytes(view.format, first_row, view.cols);
      std::memcpy(out, static_cast<const char*>(view.data) + begin,
                  ops::weight_bytes(view.format, rows, view.cols));
    };
    matrices_[tensor.name] = {upload_->matrix(tensor.name, view.format, view.rows, view.cols, copy),
                              nullptr};
  } else {
    matrices_[tensor.name] = {view, tensor.owner};
  }
  total_bytes_ += ops::weight_bytes(view.format, view.rows, view.cols);
}

void Weights::add(const SourceTensor& tensor, const ExecContext& context) {
  check_new(tensor.name);
  if (is_vector(tensor.name)) {
    const int64_t size = tensor.rows * tensor.cols;
    float* values = static_cast<float*>(arena_allocate(static_cast<size_t>(size) * sizeof(float)));
    ops::decode_source(values, tensor.rows, tensor.cols, tensor.type, tensor.data, context);
    vectors_[tensor.name] = {values, size};
    total_bytes_ += static_cast<size_t>(size) * sizeof(float);
    return;
  }
  const WeightFormat format = choose_format(requested_, tensor.type, gpu_ != nullptr);
  const bool in_place = used_in_place(format, tensor.type);
  Matrix matrix{{tensor.data, format, tensor.rows, tensor.cols, tensor.cols}, nullptr};
  const size_t bytes = ops::weight_bytes(format, tensor.rows, tensor.cols);
  if (upload_ != nullptr) {
    matrix.view =
        upload_->matrix(tensor.name, format, tensor.rows, tensor.cols,
                        [&](void* out, int64_t first_row, int64_t rows) {
                          pack(static_cast<char*>(out), format, tensor, first_row, rows, context);
                        });
  } else if (in_place) {
    matrix.owner = tensor.owner;
  } else {
    char* packed = static_cast<char*>(arena_allocate(bytes));
    pack(packed, format, tensor, 0, tensor.rows, context);
    matrix.view.data = packed;
  }
  matrices_[tensor.name] = matrix;
  total_bytes_ += bytes;
}

/// Block by block, so that the resident set never holds a large tensor twice. `first_row` starts a
/// panel.
void Weights::pack(char* out, WeightFormat format, const SourceTensor& tensor, int64_t first_row,
                   int64_t rows, const ExecContext& context) {
  const size_t row_bytes = ops::source_bytes(tensor.type, 1, tensor.cols);
  const int64_t panels =
      std::max<int64_t>(1, static_cast<int64_t>(kPackBlock / row_bytes) / kPanelRows);
  const int64_t block = panels * kPanelRows, end = first_row + rows;
  for (int64_t row = first_row; row < end; row += block) {
    const int64_t count = std::min(block, end - row);
    const size_t begin = static_cast<size_t>(row) * row_bytes;
    ops::pack_weight(out, format, count, tensor.cols, tensor.type,
                     static_cast<const char*>(tensor.data) + begin, context);
    out += ops::weight_bytes(format, count, tensor.cols);
    if (tensor.release) tensor.release(begin, begin + static_cast<size_t>(count) * row_bytes);
  }
}

const WeightView& Weights::matrix(const std::string& name) const {
  const auto found = matrices_.find(name);
  QN_CHECK(found != matrices_.end(), "[model] tensor ", name, " is missing");
  return found->second.view;
}

WeightView Weights::expect_matrix(const std::string& name, int64_t rows, int64_t cols) const {
  const WeightView& view = matrix(name);
  QN_CHECK(view.rows == rows && view.cols == cols, "[model] tensor ", name, " is [", view.rows,
           ", ", view.cols, "], expected [", rows, ", ", cols, "]");
  return view;
}

const float* Weights::expect_vector(const std::string& name, int64_t size) const {
  const auto found = vectors_.find(name);
  QN_CHECK(found != vectors_.end(), "[model] tensor ", name, " is missing");
  QN_CHECK(found->second.second == size, "[model] tensor ", name, " has ", found->second.second,
           " elements, expected ", size);
  return found->second.first;
}

/// The weight of a norm over whole rows, where the model runs.
const float* Weights::norm_vector(const std::string& name, int64_t size) {
  const float* values = expect_vector(name, size);
  return upload_ == nullptr ? values
                            : upload_->vector(name, values, size, DType::F32).as<const float>();
}

/// Values of our own, where the model runs.
const float* Weights::keep(const std::string& name, const std::vector<float>& values) {
  const int64_t size = static_cast<int64_t>(values.size());
  if (upload_ != nullptr)
    return upload_->vector(name, values.data(), size, DType::F32).as<const float>();
  auto* kept = static_cast<float*>(arena_allocate(values.size() * sizeof(float)));
  std::copy(values.begin(), values.end(), kept);
  return kept;
}

/// A vector that append_qkv takes, where the model runs.
TensorView Weights::head_vector(const std::string& name, int64_t size) {
  const float* values = expect_vector(name, size);
  return upload_ == nullptr ? TensorView(const_cast<float*>(values), DType::F32, {size})
                            : upload_->vector(name, values, size, DType::BF16);
}

Linear Weights::linear(std::initializer_list<std::pair<std::string, int64_t>> parts, int64_t cols,
                       bool bias) const {
  Linear result;
  for (const auto& [name, rows] : parts) {
    const float* bias_values =
        bias && gpu_ == nullptr ? expect_vector(name + ".bias", rows) : nullptr;
    result.segments.push_back(
        {expect_matrix(name + ".weight", rows, cols), bias_values, result.out_features});
    result.out_features += rows;
  }
  return result;
}

/// The biases of the three projections, one after the other.
TensorView Weights::upload_qkv_bias(const std::string& attention) {
  std::vector<float> bias;
  for (const auto& [name, size] : {std::pair{"q_proj.bias", config_.query_width()},
                                   std::pair{"k_proj.bias", config_.kv_width()},
                                   std::pair{"v_proj.bias", config_.kv_width()}}) {
    const float* values = expect_vector(attention + name, size);
    bias.insert(bias.end(), values, values + size);
  }
  return upload_->vector(attention + "qkv.bias", bias.data(), static_cast<int64_t>(bias.size()),
                         DType::BF16);
}

void Weights::finish() {
  const ModelConfig& c = config_;
  expect_matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    const std::string attention = layer + "self_attn.";
    LayerWeights w{};
    w.input_norm = norm_vector(layer + "input_layernorm.weight", c.hidden_size);
    w.qkv = linear({{attention + "q_proj", c.query_width()},
                    {attention + "k_proj", c.kv_width()},
                    {attention + "v_proj", c.kv_width()}},
                   c.hidden_size, c.qkv_bias);
    if (c.qk_norm) {
      w.q_norm = head_vector(attention + "q_norm.weight", c.head_dim);
      w.k_norm = head_vector(attention + "k_norm.weight", c.head_dim);
    }
    if (c.qkv_bias) {
      w.key_scale = keep(attention + "key_scale",
                         key_scale(expect_vector(attention + "k_proj.bias", c.kv_width()), c));
      if (upload_ != nullptr) w.qkv_bias = upload_qkv_bias(attention);
    }
    w.o_proj = linear({{attention + "o_proj", c.hidden_size}}, c.query_width(), false);
    w.post_attention_norm = norm_vector(layer + "post_attention_layernorm.weight", c.hidden_size);
    const std::string mlp = layer + "mlp.";
    w.mlp.gate = expect_matrix(mlp + "gate_proj.weight", c.intermediate_size, c.hidden_size);
    w.mlp.up = expect_matrix(mlp + "up_proj.weight", c.intermediate_size, c.hidden_size);
    w.mlp.down = expect_matrix(mlp + "down_proj.weight", c.hidden_size, c.intermediate_size);
    layers_.push_back(std::move(w));
  }
  final_norm_ = norm_vector("model.norm.weight", c.hidden_size);
  const std::string head = c.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  lm_head_ = {{{expect_matrix(head, c.vocab_size, c.hidden_size), nullptr, 0}}, c.vocab_size};
  if (upload_ != nullptr) upload_->finish();
}

std::map<std::string, std::pair<int64_t, size_t>> Weights::bytes_by_format() const {
  std::map<std::string, std::pair<int64_t, size_t>> result;
  for (const auto& [name, entry] : matrices_) {
    const WeightView& view = entry.view;
    auto& [count, bytes] = result[format_name(view.format)];
    count += view.rows * view.cols;
    bytes += ops::weight_bytes(view.format, view.rows, view.cols);
  }
  return result;
}

}  // namespace qn::model
