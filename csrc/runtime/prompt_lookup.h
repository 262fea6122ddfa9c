// Guesses how a sequence goes on from what it already says (prompt lookup decoding: drafts without
// a draft model). Integers only; what it does depends on tokens alone, never on time.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace qn::rt {

/// What a step is expected to yield and to cost: another row of it costs `row_cost` of a step with
/// one row, and yields a token with the probability that its guess is right.
class StepEstimate {
 public:
  StepEstimate(int64_t rows, double row_cost)
      : tokens_(static_cast<double>(rows)),
        time_(1 + row_cost * static_cast<double>(rows - 1)),
        row_cost_(row_cost) {}

  /// Adds a row if it raises the tokens per time.
  bool add(double probability) {
    if (probability * time_ <= row_cost_ * tokens_) return false;
    tokens_ += probability;
    time_ += row_cost_;
    return true;
  }

 private:
  double tokens_, time_, row_cost_;
};

/// One earlier place of the sequence is followed as long as the sequence repeats it. A place is
/// found by the last three tokens (their latest occurrence) or, after a wrong guess, by the last
/// token alone a little further on: edited text takes up its source again after the edit. The
/// guess is compared with every new token, whether a step drafts it or not, so that the success
/// rates are known at no cost.
class PromptLookup {
 public:
  /// Takes in the tokens after those of the last call, in constant time for each.
  void update(std::span<const int32_t> tokens);

  /// Appends to `draft` the guesses for what follows `tokens` (those of the last update), at most
  /// `most`, as long as `step` is better off with them.
  void draft(std::span<const int32_t> tokens, int64_t most, StepEstimate& step,
             std::vector<int32_t>& draft) const;

 private:
  static constexpr int kRates = 4;  // by how many tokens the guess has matched: 1, to 3, to 7, more
  static int rate_index(int64_t matched);
  void follow(std::span<const int32_t> tokens, int64_t next);
  void find_place(std::span<const int32_t> tokens);

  std::unordered_map<uint64_t, int64_t> after_;  // three tokens -> where their latest run ended
  int64_t known_ = 0;                            // tokens taken in
  int64_t place_ = -1;       // where the token that is guessed next stands; -1 = no guess
  int64_t matched_ = 0;      // tokens before place_ that equal the sequence's last ones
  int64_t lost_place_ = -1;  // of the latest wrong guess
  std::array<double, kRates> rate_ = {0.3, 0.5, 0.7, 0.85};  // share of guesses that came true
};

}  // namespace qn::rt
