#include "runtime/prompt_lookup.h"

#include <algorithm>

namespace qn::rt {
namespace {

constexpr int64_t kRun = 3;            // tokens that find a place
constexpr int64_t kResumeWithin = 16;  // tokens after a wrong guess
constexpr double kLearningRate = 1.0 / 16;

/// The last three tokens before `end`; ids over 2^21 may collide, which only costs a guess.
uint64_t run_key(std::span<const int32_t> tokens, int64_t end) {
  uint64_t key = 0;
  for (int64_t i = end - kRun; i < end; ++i) {
    key = key << 21 ^ static_cast<uint64_t>(tokens[static_cast<size_t>(i)]);
  }
  return key;
}

}  // namespace

int PromptLookup::rate_index(int64_t matched) {
  return matched <= 1 ? 0 : matched <= 3 ? 1 : matched <= 7 ? 2 : 3;
}

void PromptLookup::update(std::span<const int32_t> tokens) {
  for (; known_ < static_cast<int64_t>(tokens.size()); ++known_) {
    if (place_ >= 0) follow(tokens, known_);
    const auto seen = tokens.first(static_cast<size_t>(known_) + 1);
    if (place_ < 0) find_place(seen);
    if (known_ + 1 >= kRun) after_[run_key(seen, known_ + 1)] = known_ + 1;
  }
}

/// Judges the guess for position `next` by the token that stands there now.
void PromptLookup::follow(std::span<const int32_t> tokens, int64_t next) {
  const bool right = tokens[static_cast<size_t>(place_)] == tokens[static_cast<size_t>(next)];
  double& rate = rate_[static_cast<size_t>(rate_index(matched_))];
  rate += kLearningRate * ((right ? 1.0 : 0.0) - rate);
  if (right) {
    ++place_;
    ++matched_;
  } else {
    lost_place_ = place_;
    place_ = -1;
  }
}

void PromptLookup::find_place(std::span<const int32_t> tokens) {
  const int64_t end = static_cast<int64_t>(tokens.size());
  if (end >= kRun) {
    const auto run = after_.find(run_key(tokens, end));
    if (run != after_.end()) {
      place_ = run->second;
      matched_ = kRun;
      return;
    }
  }
  if (lost_place_ < 0) return;
  const auto from = tokens.begin() + lost_place_;
  const auto to = tokens.begin() + std::min(lost_place_ + kResumeWithin, end - 1);
  const auto found = std::find(from, to, tokens.back());
  if (found != to) {
    place_ = found - tokens.begin() + 1;
    matched_ = 1;
  }
}

void PromptLookup::draft(std::span<const int32_t> tokens, int64_t most, StepEstimate& step,
                         std::vector<int32_t>& draft) const {
  if (place_ < 0) return;
  const int64_t known = static_cast<int64_t>(tokens.size());
  double probability = 1;
  for (int64_t i = 0; i < most; ++i) {
    probability *= rate_[static_cast<size_t>(rate_index(matched_ + i))];
    if (!step.add(probability)) return;
    const int64_t place = place_ + i;  // may lie among the guesses, when the text repeats itself
    draft.push_back(place < known ? tokens[static_cast<size_t>(place)]
                                  : draft[static_cast<size_t>(place - known)]);
  }
}

}  // namespace qn::rt
