// Rotary embedding: which frequencies a sequence uses, and cos/sin of the positions in a step.
#pragma once
#include <cstdint>
#include <vector>

#include "model/config.h"

namespace qn::model {

/// Frequencies of one sequence, fixed when its prompt is prefilled.
struct RopeFrequencies {
  std::vector<float> inv_freq;  // [rope_dim / 2]
  float attention_factor = 1;   // multiplies cos and sin (YaRN)
};

/// `prompt_length` matters for dynamic NTK only: alpha = max(1, 2^ceil(log2(n / seq_length) + 1) -
/// 1) and base' = base * alpha^(d / (d - 2)) (qwen_facts §2.3, reference modeling_qwen.py); the
/// reference decides alpha once, on the whole prompt.
RopeFrequencies rope_frequencies(const ModelConfig& config, int64_t prompt_length);

/// cos and sin of position * inv_freq, both [rope_dim / 2]; the angle is a float32 product, as in
/// the references.
void rope_position(const RopeFrequencies& frequencies, int64_t position, float* cos, float* sin);

/// LogN factor of a query at a 0-based position: log(p + 1) / log(seq_length) beyond seq_length,
/// else 1.
float logn_scale(const ModelConfig& config, int64_t position);

}  // namespace qn::model
