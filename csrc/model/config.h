// ModelConfig: what distinguishes one Qwen checkpoint from another. Generations are flags, not
// classes.
#pragma once
#include <cstdint>
#include <string>

namespace qn::model {

/// YaRN context extension; off while factor is 0. Formula: qwen_facts §4.1, as transformers
/// computes it.
struct YarnScaling {
  double factor = 0;
  int64_t original_max_position_embeddings = 0;
  double attention_factor = 1;  // multiplies cos and sin
  double beta_fast = 32;
  double beta_slow = 1;
};

struct ModelConfig {
  std::string architecture;  // "qwen", "qwen2" or "qwen3"
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;  // width of one MLP branch
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;  // rows of the embedding
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000;
  int64_t rope_dim = 0;
  YarnScaling yarn;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;
  bool qk_norm = false;           // RMSNorm of every query and key head before RoPE (Qwen3)
  int64_t sliding_window = 0;     // keys that a query sees in the windowed layers; 0 = all
  int64_t max_window_layers = 0;  // layers from this one on use the window
  bool use_dynamic_ntk = false;   // Qwen: the base grows with the prompt's length
  bool use_logn_attn =
      false;  // Qwen: queries beyond seq_length are scaled by log(position) / log(seq_length)
  int64_t seq_length = 0;  // Qwen: training length, for the two above

  int64_t query_width() const { return num_heads * head_dim; }
  int64_t kv_width() const { return num_kv_heads * head_dim; }
  int64_t window_of_layer(int64_t layer) const {
    return layer >= max_window_layers ? sliding_window : 0;
  }
};

}  // namespace qn::model
