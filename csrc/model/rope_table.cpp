#include "model/rope_table.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace qn::model {
namespace {

double ntk_base(const ModelConfig& config, int64_t prompt_length) {
  if (!config.use_dynamic_ntk || config.seq_length <= 0) return config.rope_theta;
  const double ratio = static_cast<double>(prompt_length) / static_cast<double>(config.seq_length);
  const double alpha = std::max(1.0, std::exp2(std::ceil(std::log2(ratio) + 1.0)) - 1.0);
  const double d = static_cast<double>(config.rope_dim);
  return config.rope_theta * std::pow(alpha, d / (d - 2.0));
}

/// Interpolates between the extrapolated and the interpolated frequencies over the dimensions whose
/// wavelength makes between beta_slow and beta_fast rotations within the original context.
void apply_yarn(const ModelConfig& config, std::vector<float>& inv_freq) {
  const YarnScaling& yarn = config.yarn;
  const double d = static_cast<double>(config.rope_dim);
  const auto correction_dim = [&](double rotations) {
    const double length = static_cast<double>(yarn.original_max_position_embeddings);
    return d * std::log(length / (rotations * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(config.rope_theta));
  };
  const double low = std::max(std::floor(correction_dim(yarn.beta_fast)), 0.0);
  double high = std::min(std::ceil(correction_dim(yarn.beta_slow)), d - 1.0);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    const double extrapolated = inv_freq[i];
    const double interpolated = extrapolated / yarn.factor;
    inv_freq[i] = static_cast<float>(interpolated * ramp + extrapolated * (1.0 - ramp));
  }
}

}  // namespace

RopeFrequencies rope_frequencies(const ModelConfig& config, int64_t prompt_length) {
  RopeFrequencies frequencies;
  const double base = ntk_base(config, prompt_length);
  frequencies.inv_freq.resize(static_cast<size_t>(config.rope_dim / 2));
  for (size_t i = 0; i < frequencies.inv_freq.size(); ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(config.rope_dim);
    frequencies.inv_freq[i] = static_cast<float>(1.0 / std::pow(base, exponent));
  }
  if (config.yarn.factor > 0) {
    apply_yarn(config, frequencies.inv_freq);
    frequencies.attention_factor = static_cast<float>(config.yarn.attention_factor);
  }
  return frequencies;
}

void rope_position(const RopeFrequencies& frequencies, int64_t position, float* cos, float* sin) {
  for (size_t i = 0; i < frequencies.inv_freq.size(); ++i) {
    const float angle = static_cast<float>(position) * frequencies.inv_freq[i];
    cos[i] = std::cos(angle) * frequencies.attention_factor;
    sin[i] = std::sin(angle) * frequencies.attention_factor;
  }
}

float logn_scale(const ModelConfig& config, int64_t position) {
  if (!config.use_logn_attn || config.seq_length <= 1 || position + 1 <= config.seq_length)
    return 1.0f;
  return static_cast<float>(std::log(static_cast<double>(position + 1)) /
                            std::log(static_cast<double>(config.seq_length)));
}

}  // namespace qn::model
