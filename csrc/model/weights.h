// The weights of one model: built tensor by tensor from a checkpoint, then read-only.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/context.h"
#include "model/config.h"
#include "model/gpu_upload.h"
#include "ops/ops.h"

namespace qn::model {

/// How matrices are held: all in one format, or (nullopt) each in the format nearest to the
/// checkpoint's own precision.
using RequestedFormat = std::optional<WeightFormat>;

/// A tensor of a checkpoint under its canonical (Hugging Face Qwen2/Qwen3) name.
struct SourceTensor {
  std::string name;
  SourceType type;
  int64_t rows, cols;  // vectors have one row
  const void* data;
  std::shared_ptr<const void> owner;  // keeps `data` alive where the weight is used in place
  std::function<void(size_t begin, size_t end)>
      release;  // these bytes are not needed any more; may be empty
};

/// A tensor that already has the engine's layout: a matrix in any format, or (one row, F32) a
/// vector. `data` is 64-byte aligned and used where it lies, `owner` keeps it alive.
struct PackedTensor {
  std::string name;
  WeightView view;
  std::shared_ptr<const void> owner;
};

/// Whether a tensor is held as plain float32 values: norms and biases.
bool is_vector(const std::string& name);

/// The format that a matrix of type `source` gets. On a GPU floats are bf16 and "int4" is
/// Int4Symmetric, the 4-bit format that its kernels read.
WeightFormat choose_format(RequestedFormat requested, SourceType source, bool on_gpu = false);

/// Matrices that take the same input; their outputs stand side by side.
struct Linear {
  std::vector<ops::LinearSegment> segments;
  int64_t out_features = 0;
};

struct LayerWeights {
  const float* input_norm;           // [hidden]
  Linear qkv;                        // hidden -> (num_heads + 2 num_kv_heads) head_dim
  TensorView qkv_bias;               // of all three on a GPU; on the host the segments have it
  TensorView q_norm, k_norm;         // [head_dim] or no data
  const float* key_scale;            // of an int8 KV cache [num_kv_heads, head_dim], or null
  Linear o_proj;                     // num_heads head_dim -> hidden
  const float* post_attention_norm;  // [hidden]
  ops::MlpWeights mlp;               // hidden -> intermediate -> hidden
};

/// On the host, or sent to a GPU tensor by tensor.
class Weights {
 public:
  Weights(const ModelConfig& config, RequestedFormat requested,
          std::shared_ptr<const Gpu> gpu = nullptr);

  /// Converts one tensor to its format; F32 and BF16 matrices that already have it are used where
  /// they are mapped.
  void add(const SourceTensor& tensor, const ExecContext& context);

  /// Takes one tensor as it lies.
  void add_packed(const PackedTensor& tensor);

  /// Arranges the tensors into layers; throws ArgumentError naming the first one that is missing or
  /// mis-shaped.
  void finish();

  const std::vector<LayerWeights>& layers() const { return layers_; }
  const WeightView& embedding() const { return matrix("model.embed_tokens.weight"); }
  const float* final_norm() const { return final_norm_; }
  const Linear& lm_head() const { return lm_head_; }

  /// Where the weights are; null: on the host.
  const std::shared_ptr<const Gpu>& gpu() const { return gpu_; }

  /// Bytes of all weights, mapped ones included.
  size_t total_bytes() const { return total_bytes_; }
  /// Number of weights in matrices and the bytes they take, by format name.
  std::map<std::string, std::pair<int64_t, size_t>> bytes_by_format() const;

 private:
  struct Matrix {
    WeightView view;
    std::shared_ptr<const void> owner;
  };

  void check_new(const std::string& name) const;
  void* arena_allocate(size_t bytes);
  void pack(char* out, WeightFormat format, const SourceTensor& tensor, int64_t first_row,
            int64_t rows, const ExecContext& context);
  const WeightView& matrix(const std::string& name) const;
  WeightView expect_matrix(const std::string& name, int64_t rows, int64_t cols) const;
  const float* expect_vector(const std::string& name, int64_t size) const;
  const float* norm_vector(const std::string& name, int64_t size);
  const float* keep(const std::string& name, const std::vector<float>& values);
  TensorView head_vector(const std::string& name, int64_t size);
  TensorView upload_qkv_bias(const std::string& attention);
  Linear linear(std::initializer_list<std::pair<std::string, int64_t>> parts, int64_t cols,
                bool bias) const;

  ModelConfig config_;
  RequestedFormat requested_;
  std::shared_ptr<const Gpu> gpu_;
  std::unique_ptr<GpuUpload> upload_;  // owns what is on the GPU
  std::vector<HostBuffer> arena_;
  size_t arena_used_ = 0;
  std::map<std::string, Matrix> matrices_;
  std::map<std::string, std::pair<const float*, int64_t>> vectors_;
  std::vector<std::shared_ptr<const void>> vector_owners_;
  std::vector<LayerWeights> layers_;
  const float* final_norm_ = nullptr;
  Linear lm_head_;
  size_t total_bytes_ = 0;
};

const char* format_name(WeightFormat format);

/// The format that keeps the precision of `source` ("auto"): floats stay, Q8_0 and Q4_0 are held
/// exactly, every other block type goes to 8 bits in groups, which loses nothing measurable. F16
/// becomes F32, the only format that holds it exactly.
WeightFormat native_format(SourceType source);

}  // namespace qn::model
