// Chooses the next token of one sequence from its logits.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/context.h"
#include "ops/gpu.h"

namespace qn::rt {

/// How a sequence is sampled. The steps run in this order, as in transformers: logit_bias,
/// repetition penalty, frequency and presence penalty, temperature, top_k, top_p, min_p.
struct SamplingParams {
  float temperature =
      1;            // 0 = greedy: the largest logit after bias and penalties, lowest id of equals
  float top_p = 1;  // smallest set of likeliest tokens whose probability reaches this; 1 = off
  float min_p = 0;  // drops tokens less likely than min_p times the likeliest; 0 = off
  int top_k = 0;    // keeps the k largest logits and all that equal the k-th; 0 = off
  float repetition_penalty =
      1;  // divides positive logits of tokens in the prompt or the output, multiplies negative
  float presence_penalty = 0;   // subtracted from logits of tokens in the output
  float frequency_penalty = 0;  // subtracted once per occurrence in the output
  std::vector<std::pair<int32_t, float>>
      logit_bias;  // (token id, added to its logit); -inf forbids a token
  uint64_t seed = 0;
  int logprobs = -1;  // likeliest alternatives reported with each token; -1 = no log-probabilities
};

/// Throws ArgumentError naming the field and its value when one is out of range.
void validate(const SamplingParams& params, int64_t vocab);

struct TokenLogprob {
  int32_t id;
  float logprob;
};

struct SampledToken {
  int32_t id;
  /// logits[id] - log_sum_exp(logits) in float32, of the logits as the model gave them, before
  /// bias, penalties and temperature: what score() computes. Only when
  /// asked for (logprobs >= 0).
  std::optional<float> logprob;
  /// Log of the probability that the draw gave to this token: after bias, penalties, temperature,
  /// top_k, top_p and min_p; 0 when greedy.
  float drawn_logprob;
  std::vector<TokenLogprob>
      alternatives;  // the `logprobs` likeliest tokens under the same logits, best first
};

/// State of one sequence: what it contains and how many tokens it drew. A token depends on the
/// seed, its index in the output and the logits; on nothing else.
class Sampler {
 public:
  Sampler(SamplingParams params, std::span<const int32_t> prompt);

  /// Draws a token and records it. logits [vocab] are modified during the call and restored. Throws
  /// ArgumentError as validate() does, and Error when the logits have NaN or +inf or leave no token
  /// to choose. May run inside a parallel region.
  SampledToken sample(float* logits, int64_t vocab, const ExecContext& context);

  /// How a GPU may draw the next token; nothing when that takes the logits (penalties, bias,
  /// log-probabilities).
  std::optional<ops::DrawOptions> draw_options() const;
  /// Records a token that was drawn so, as sample() would; -1 throws Error.
  SampledToken accept(int32_t token, float drawn_logprob);

  /// The distribution that the next sample() would draw from: (id, probability), likeliest first.
  /// For tests.
  std::vector<std::pair<int32_t, double>> distribution(float* logits, int64_t vocab,
                                                       const ExecContext& context);

  /// Uniform number in [0, 1) that draws token `index` of a sequence: Philox4x32-10 (Salmon et al.,
  /// "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as key and the index as
  /// counter.
  static double uniform(uint64_t seed, uint64_t index);

 private:
  struct Candidate {
    int32_t id;
    float score;    // logit / temperature
    double weight;  // exp(score - largest score)
  };
  /// Logits with bias and penalties applied, restored at the end of the scope.
  class Edits;
  struct Choice {
    int32_t id;
    double probability;  // that this draw gave to it
  };

  Choice choose(const float* logits, int64_t vocab, const ExecContext& context);
  void largest_blocks(const float* logits, int64_t vocab, const ExecContext& context);
  float block_threshold(int64_t count);
  void collect(const float* logits, int64_t vocab, float threshold);
  static bool less_likely(const Candidate& a, const Candidate& b);
  void rank_candidates();
  double total_weight() const;
  void filter(const float* logits, int64_t vocab, const ExecContext& context);
  double exp_sums(const float* logits, int64_t vocab, float scale, const ExecContext& context);
  Choice draw_from_all(const float* logits, int64_t vocab, const ExecContext& context);
  std::vector<TokenLogprob> top(const float* logits, int64_t vocab, float log_sum);
  int32_t likeliest(const float* logits, int64_t vocab) const;
  float score(float logit) const { return logit / params_.temperature; }
  float inverse_temperature() const {
    return std::min(1.0f / params_.temperature, std::numeric_limits<float>::max());
  }

  SamplingParams params_;
  bool penalties_, edits_logits_;
  uint64_t drawn_ = 0;
  std::unordered_map<int32_t, int32_t>
      seen_;                      // token -> occurrences in the output; 0 for those of the prompt
  std::vector<float> block_max_;  // of the logits at hand
  std::vector<float> block_sum_;
  std::vector<float> scratch_;
  std::vector<Candidate> candidates_;
  float largest_ = 0;
};

}  // namespace qn::rt
