// The Qwen network, every dense generation: forward over a batch of sequence chunks with a paged KV
// cache.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "model/config.h"
#include "model/weights.h"

namespace qn::model {

/// What one step computes, built once and read by every op.
struct BatchPlan {
  std::vector<int32_t> token_ids;        // [tokens]
  std::vector<ops::SequenceSpan> spans;  // cover the tokens in order
  std::vector<float> cos, sin;           // [tokens, rope_dim / 2]
  std::vector<float> query_scale;        // [tokens] LogN factors, or empty
  std::vector<int32_t> output_rows;      // tokens whose final hidden state is wanted
  bool exact = false;                    // 4-bit weights round as in a step of one token

  int64_t tokens() const { return static_cast<int64_t>(token_ids.size()); }
  /// Views of the above, for ops on the host.
  ops::Batch batch() const;
};

class QwenModel {
 public:
  /// `invariant`: 4-bit weights round the same way whatever the batch (ops::linear).
  QwenModel(const ModelConfig& config, std::unique_ptr<Weights> weights, bool invariant)
      : config_(config), weights_(std::move(weights)), invariant_(invariant) {}

  const ModelConfig& config() const { return config_; }
  const Weights& weights() const { return *weights_; }

  /// Runs all layers over the batch's tokens, appends their keys and values to the cache, and
  /// leaves the final-norm hidden states of batch.output_rows in `hidden`, of the context's
  /// activation_dtype() [output_rows, hidden_size]; `exact` as in BatchPlan.
  void forward(const TensorView& hidden, const ops::Batch& batch,
               std::span<const ops::KvLayer> kv_layers, bool exact,
               const ExecContext& context) const;

  /// logits f32 [rows, vocab_size] = lm_head of hidden [rows, hidden_size]; `exact` as in
  /// BatchPlan.
  void logits(const TensorView& logits, const TensorView& hidden, bool exact,
              const ExecContext& context) const;

 private:
  ModelConfig config_;
  std::unique_ptr<Weights> weights_;
  bool invariant_;
};

}  // namespace qn::model
