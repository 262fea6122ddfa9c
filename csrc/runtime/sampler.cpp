#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "core/error.h"
#include "ops/ops.h"

namespace qn::rt {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowestTemperature = 1e-5f;  // below, dividing by it would overflow
constexpr int64_t kBlock = ops::kVocabBlock;

TensorView row(const float* data, int64_t n) { return {const_cast<float*>(data), DType::F32, {n}}; }

int64_t block_count(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }

void check_finite(const char* name, float value) {
  QN_CHECK(std::isfinite(value), "[sampling] ", name, " is ", value, ", expected a finite number");
}

}  // namespace

void validate(const SamplingParams& params, int64_t vocab) {
  check_finite("temperature", params.temperature);
  QN_CHECK(params.temperature == 0 || params.temperature >= kLowestTemperature,
           "[sampling] temperature is ", params.temperature, ", expected 0 (greedy) or at least ",
           kLowestTemperature);
  QN_CHECK(params.top_p > 0 && params.top_p <= 1, "[sampling] top_p is ", params.top_p,
           ", expected more than 0 and at most 1");
  QN_CHECK(params.min_p >= 0 && params.min_p <= 1, "[sampling] min_p is ", params.min_p,
           ", expected 0 to 1");
  QN_CHECK(params.top_k >= 0, "[sampling] top_k is ", params.top_k, ", expected 0 (off) or more");
  check_finite("repetition_penalty", params.repetition_penalty);
  QN_CHECK(params.repetition_penalty > 0, "[sampling] repetition_penalty is ",
           params.repetition_penalty, ", expected more than 0");
  check_finite("presence_penalty", params.presence_penalty);
  check_finite("frequency_penalty", params.frequency_penalty);
  for (const auto& [id, bias] : params.logit_bias) {
    QN_CHECK(id >= 0 && id < vocab, "[sampling] logit_bias names token ", id, ", expected 0 to ",
             vocab - 1);
    QN_CHECK(std::isfinite(bias) || bias == -kInfinity, "[sampling] logit_bias of token ", id,
             " is ", bias, ", expected a finite number or -inf");
  }
  QN_CHECK(params.logprobs >= -1 && params.logprobs <= vocab, "[sampling] logprobs is ",
           params.logprobs, ", expected -1 (none) to ", vocab);
}

class Sampler::Edits {
 public:
  Edits(const Sampler& sampler, float* logits, int64_t vocab) : logits_(logits) {
    const SamplingParams& params = sampler.params_;
    for (const auto& [id, bias] : params.logit_bias) edit(id, logits[id] + bias);
    for (const auto& [id, count] : sampler.seen_) {
      if (id < 0 || id >= vocab) continue;
      float value = logits[id];
      value = value < 0 ? value * params.repetition_penalty : value / params.repetition_penalty;
      if (count > 0) {
        value -= params.presence_penalty + params.frequency_penalty * static_cast<float>(count);
      }
      edit(id, value);
    }
  }
  ~Edits() {
    for (auto saved = saved_.rbegin(); saved != saved_.rend(); ++saved)
      logits_[saved->first] = saved->second;
  }
  Edits(const Edits&) = delete;
  Edits& operator=(const Edits&) = delete;

 private:
  void edit(int32_t id, float value) {
    saved_.emplace_back(id, logits_[id]);
    logits_[id] = value;
  }

  float* logits_;
  std::vector<std::pair<int32_t, float>> saved_;
};

Sampler::Sampler(SamplingParams params, std::span<const int32_t> prompt)
    : params_(std::move(params)) {
  penalties_ = params_.repetition_penalty != 1 || params_.presence_penalty != 0 ||
               params_.frequency_penalty != 0;
  edits_logits_ = penalties_ || !params_.logit_bias.empty();
  if (params_.repetition_penalty != 1) {
    for (int32_t id : prompt) seen_.try_emplace(id, 0);
  }
}

double Sampler::uniform(uint64_t seed, uint64_t index) {
  constexpr uint64_t kMultiply[2] = {0xD2511F53, 0xCD9E8D57};
  constexpr uint32_t kWeyl[2] = {0x9E3779B9, 0xBB67AE85};
  uint32_t counter[4] = {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = kMultiply[0] * counter[0], b = kMultiply[1] * counter[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
        static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, counter);
    for (int i = 0; i < 2; ++i) key[i] += kWeyl[i];
  }
  const uint64_t bits = static_cast<uint64_t>(counter[1]) << 32 | counter[0];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

void Sampler::largest_blocks(const float* logits, int64_t vocab, const ExecContext& context) {
  block_max_.resize(static_cast<size_t>(block_count(vocab)));
  ops::block_max(row(block_max_.data(), block_count(vocab)), row(logits, vocab), context);
  largest_ = -kInfinity;
  for (float value : block_max_) {
    if (std::isnan(value)) QN_FAIL("[sampler] logits have NaN, expected finite numbers or -inf");
    largest_ = std::max(largest_, value);
  }
}

/// The first token with the largest logit.
int32_t Sampler::likeliest(const float* logits, int64_t vocab) const {
  const auto block = std::find(block_max_.begin(), block_max_.end(), largest_) - block_max_.begin();
  return static_cast<int32_t>(std::find(logits + block * kBlock, logits + vocab, largest_) -
                              logits);
}

/// A value that at least `count` logits reach: the count-th largest of the blocks' maxima.
float Sampler::block_threshold(int64_t count) {
  if (count >= static_cast<int64_t>(block_max_.size())) return -kInfinity;
  scratch_ = block_max_;
  std::nth_element(scratch_.begin(), scratch_.begin() + (count - 1), scratch_.end(),
                   std::greater<>());
  return scratch_[static_cast<size_t>(count - 1)];
}

/// All tokens whose score reaches that of `threshold`, with weights, in the order of ids.
void Sampler::collect(const float* logits, int64_t vocab, float threshold) {
  candidates_.clear();
  const float lowest = score(threshold), highest = score(largest_);
  for (size_t block = 0; block < block_max_.size(); ++block) {
    if (score(block_max_[block]) < lowest) continue;
    const int64_t first = static_cast<int64_t>(block) * kBlock;
    for (int64_t id = first; id < std::min(vocab, first + kBlock); ++id) {
      const float value = score(logits[id]);
      if (value >= lowest && logits[id] > -kInfinity)
        candidates_.push_back({static_cast<int32_t>(id), value, 0});
    }
  }
  for (Candidate& candidate : candidates_) {
    const double distance = static_cast<double>(candidate.score) - highest;
    candidate.weight = candidate.score == highest ? 1.0 : std::exp(distance);
  }
}

/// Order of candidates; of equals the higher id is the less likely.
bool Sampler::less_likely(const Candidate& a, const Candidate& b) {
  return a.score != b.score ? a.score < b.score : a.id > b.id;
}

void Sampler::rank_candidates() {
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return less_likely(b, a); });
}

double Sampler::total_weight() const {
  double total = 0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  return total;
}

/// Sum of exp((logit - largest) * scale), and in block_sum_ those of the blocks.
double Sampler::exp_sums(const float* logits, int64_t vocab, float scale,
                         const ExecContext& context) {
  block_sum_.resize(static_cast<size_t>(block_count(vocab)));
  ops::block_exp_sum(row(block_sum_.data(), block_count(vocab)), row(logits, vocab), largest_,
                     scale, context);
  double total = 0;
  for (float sum : block_sum_) total += sum;
  return total;
}

/// Leaves in candidates_ the tokens that top_k, top_p and min_p keep. Only logits near the largest
/// are looked at one by one; how near is found from the blocks' maxima and widened until the result
/// is exact.
void Sampler::filter(const float* logits, int64_t vocab, const ExecContext& context) {
  const bool cuts_k = params_.top_k > 0 && params_.top_k < vocab;
  const bool cuts_p = params_.top_p < 1;
  // A heap, so that a small set out of many candidates costs no sort of them all.
  const auto keep_top_p = [&](double total) {
    const auto begin = candidates_.begin();
    auto rest = candidates_.end();
    std::make_heap(begin, rest, less_likely);
    for (double ahead = 0; rest != begin; --rest) {
      if (rest != candidates_.end() && ahead >= params_.top_p * total) break;
      ahead += begin->weight;
      std::pop_heap(begin, rest, less_likely);
    }
    candidates_.erase(begin, rest);
    std::reverse(candidates_.begin(), candidates_.end());
  };
  if (cuts_k) {
    collect(logits, vocab, block_threshold(params_.top_k));
    rank_candidates();
    const size_t k = static_cast<size_t>(params_.top_k);
    if (candidates_.size() > k) {
      const float last = candidates_[k - 1].score;
      const auto end =
          std::find_if(candidates_.begin() + static_cast<int64_t>(k), candidates_.end(),
                       [&](const Candidate& c) { return c.score < last; });
      candidates_.erase(end, candidates_.end());
    }
    if (cuts_p) {
      keep_top_p(total_weight());
    }
  } else if (cuts_p) {
    const double total = exp_sums(logits, vocab, inverse_temperature(), context);
    const int64_t blocks = block_count(vocab);
    for (int64_t count = 32;; count *= 4) {
      collect(logits, vocab, block_threshold(count));
      if (count >= blocks || total_weight() >= params_.top_p * total) break;
    }
    keep_top_p(total);
  } else {
    // A little below the exact limit, which is applied next.
    const double reach =
        params_.min_p > 0 ? std::log(static_cast<double>(params_.min_p)) - 1e-3 : -kInfinity;
    const double lowest =
        largest_ + reach * params_.temperature * (1 + 1e-5) - 1e-5 * std::abs(largest_);
    collect(logits, vocab, static_cast<float>(lowest));
    rank_candidates();
  }
  if (params_.min_p > 0) {
    const auto end = std::find_if(candidates_.begin() + 1, candidates_.end(),
                                  [&](const Candidate& c) { return c.weight < params_.min_p; });
    candidates_.erase(end, candidates_.end());
  }
}

/// Inverse of the cumulative distribution over the whole vocabulary, in the order of the ids: first
/// by blocks.
Sampler::Choice Sampler::draw_from_all(const float* logits, int64_t vocab,
                                       const ExecContext& context) {
  const double total = exp_sums(logits, vocab, inverse_temperature(), context);
  double target = total * uniform(params_.seed, drawn_);
  size_t block = 0, last_possible = 0;
  for (; block < block_sum_.size(); ++block) {
    if (block_sum_[block] > 0) last_possible = block;
    if (target < block_sum_[block]) break;
    target -= block_sum_[block];
  }
  if (block == block_sum_.size()) block = last_possible;
  const int64_t first = static_cast<int64_t>(block) * kBlock;
  int64_t chosen = -1;
  double chosen_weight = 0;
  for (int64_t id = first; id < std::min(vocab, first + kBlock); ++id) {
    const double weight =
        logits[id] == largest_
            ? 1.0
            : std::exp((static_cast<double>(logits[id]) - largest_) / params_.temperature);
    if (weight <= 0) continue;
    chosen = id;  // rounding may leave target above the sum: then the block's last possible token
    chosen_weight = weight;
    if (target < weight) break;
    target -= weight;
  }
  return {static_cast<int32_t>(chosen), chosen_weight / total};
}

/// Chooses from the logits that largest_blocks() saw.
Sampler::Choice Sampler::choose(const float* logits, int64_t vocab, const ExecContext& context) {
  if (largest_ == -kInfinity) QN_FAIL("[sampler] every logit is -inf, expected a token to choose");
  if (largest_ == kInfinity)
    QN_FAIL("[sampler] a logit is inf after bias and penalties, expected finite numbers");
  if (params_.temperature == 0) return {likeliest(logits, vocab), 1.0};
  if (!std::isfinite(score(largest_))) {
    QN_FAIL("[sampler] the largest logit is ", largest_,
            ", which overflows when divided by temperature ", params_.temperature);
  }
  const bool unfiltered =
      (params_.top_k == 0 || params_.top_k >= vocab) && params_.top_p == 1 && params_.min_p == 0;
  if (unfiltered) return draw_from_all(logits, vocab, context);
  filter(logits, vocab, context);
  const double total = total_weight();
  double target = total * uniform(params_.seed, drawn_);
  const Candidate* chosen = &candidates_.front();
  for (const Candidate& candidate : candidates_) {
    if (candidate.weight <= 0) break;
    chosen = &candidate;
    if (target < candidate.weight) break;
    target -= candidate.weight;
  }
  return {chosen->id, chosen->weight / total};
}

std::vector<TokenLogprob> Sampler::top(const float* logits, int64_t vocab, float log_sum) {
  std::vector<TokenLogprob> result;
  if (params_.logprobs <= 0) return result;
  const float threshold = block_threshold(params_.logprobs);
  std::vector<int32_t> ids;
  for (size_t block = 0; block < block_max_.size(); ++block) {
    if (block_max_[block] < threshold) continue;
    const int64_t first = static_cast<int64_t>(block) * kBlock;
    for (int64_t id = first; id < std::min(vocab, first + kBlock); ++id) {
      if (logits[id] >= threshold) ids.push_back(static_cast<int32_t>(id));
    }
  }
  const auto end =
      ids.begin() + std::min<int64_t>(params_.logprobs, static_cast<int64_t>(ids.size()));
  std::partial_sort(ids.begin(), end, ids.end(), [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  for (auto id = ids.begin(); id != end; ++id) result.push_back({*id, logits[*id] - log_sum});
  return result;
}

SampledToken Sampler::sample(float* logits, int64_t vocab, const ExecContext& context) {
  validate(params_, vocab);
  largest_blocks(logits, vocab, context);
  if (largest_ == kInfinity) QN_FAIL("[sampler] logits have inf, expected finite numbers or -inf");
  SampledToken result{};
  float log_sum = 0;
  if (params_.logprobs >= 0 && largest_ > -kInfinity) {
    log_sum = static_cast<float>(static_cast<double>(largest_) +
                                 std::log(exp_sums(logits, vocab, 1.0f, context)));
    result.alternatives = top(logits, vocab, log_sum);
  }
  Choice choice;
  if (edits_logits_) {
    const Edits edits(*this, logits, vocab);
    largest_blocks(logits, vocab, context);
    choice = choose(logits, vocab, context);
  } else {
    choice = choose(logits, vocab, context);
  }
  result.id = choice.id;
  result.drawn_logprob = static_cast<float>(std::log(choice.probability));
  if (params_.logprobs >= 0) result.logprob = logits[result.id] - log_sum;
  if (penalties_) ++seen_[result.id];
  ++drawn_;
  return result;
}

std::optional<ops::DrawOptions> Sampler::draw_options() const {
  if (edits_logits_ || params_.logprobs >= 0) return std::nullopt;
  return ops::DrawOptions{params_.temperature, params_.top_p, params_.min_p,
                          params_.top_k,       params_.seed,  drawn_};
}

SampledToken Sampler::accept(int32_t token, float drawn_logprob) {
  if (token < 0) {
    QN_FAIL("[sampler] logits have NaN or inf, or nothing but -inf, expected finite numbers");
  }
  ++drawn_;
  SampledToken result{};
  result.id = token;
  result.drawn_logprob = drawn_logprob;
  return result;
}

std::vector<std::pair<int32_t, double>> Sampler::distribution(float* logits, int64_t vocab,
                                                              const ExecContext& context) {
  validate(params_, vocab);
  const Edits edits(*this, logits, vocab);
  largest_blocks(logits, vocab, context);
  if (params_.temperature == 0) return {{likeliest(logits, vocab), 1.0}};
  filter(logits, vocab, context);
  const double total = total_weight();
  std::vector<std::pair<int32_t, double>> result;
  for (const Candidate& candidate : candidates_)
    result.emplace_back(candidate.id, candidate.weight / total);
  return result;
}

}  // namespace qn::rt
