// csrc/runtime/prompt_lookup: what it guesses on texts whose continuation is known, and when it
// stops guessing.
#include <chrono>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "runtime/prompt_lookup.h"

namespace {

using qn::rt::PromptLookup;
using qn::rt::StepEstimate;
using Tokens = std::vector<int32_t>;

constexpr double kRowCost = 0.15;

Tokens drafted(const PromptLookup& lookup, const Tokens& tokens, int64_t most = 7) {
  StepEstimate step(1, kRowCost);
  Tokens draft;
  lookup.draft(tokens, most, step, draft);
  return draft;
}

/// Feeds all of `text` and then `output` token by token; the share of `output` that one-token
/// drafts foretold, and how many they were.
struct Record {
  int drafts = 0, right = 0;
};
Record follow(PromptLookup& lookup, Tokens text, const Tokens& output) {
  Record record;
  for (int32_t token : output) {
    lookup.update(text);
    const Tokens draft = drafted(lookup, text, 1);
    record.drafts += static_cast<int>(draft.size());
    record.right += !draft.empty() && draft[0] == token;
    text.push_back(token);
  }
  return record;
}

Tokens counting(int32_t begin, int32_t end) {
  Tokens tokens;
  for (int32_t token = begin; token < end; ++token) tokens.push_back(token);
  return tokens;
}

}  // namespace

TEST(lookup_copies_a_text_after_its_first_three_tokens) {
  PromptLookup lookup;
  const Tokens text = counting(0, 200);
  const Record record = follow(lookup, text, text);
  CHECK(record.right == 197 && record.drafts == 197);
}

TEST(lookup_drafts_more_the_longer_it_is_right) {
  PromptLookup lookup;
  Tokens text = counting(0, 100);
  const Tokens copied = counting(0, 60);
  text.insert(text.end(), copied.begin(), copied.begin() + 3);
  lookup.update(text);
  const size_t at_first = drafted(lookup, text).size();
  CHECK(at_first >= 1 && at_first < 7);
  text.insert(text.end(), copied.begin() + 3, copied.end());
  lookup.update(text);
  CHECK(drafted(lookup, text) == counting(60, 67));
  CHECK(drafted(lookup, text, 2) == counting(60, 62));
  CHECK(drafted(lookup, text, 0).empty());
}

TEST(lookup_takes_up_the_text_after_an_edit) {
  PromptLookup lookup;
  const Tokens text = counting(0, 100);
  Tokens output = counting(0, 50);
  const Tokens edit = {500, 501};
  output.insert(output.end(), edit.begin(), edit.end());  // instead of 50
  const Tokens rest = counting(51, 100);
  output.insert(output.end(), rest.begin(), rest.end());
  const Record record = follow(lookup, text, output);
  // Not foretold: the first three, the edit's two, and the token that shows where the text goes on.
  CHECK(record.right == static_cast<int>(output.size()) - 6);
}

TEST(lookup_foretells_a_loop_beyond_the_known_text) {
  PromptLookup lookup;
  Tokens text;
  for (int32_t i = 0; i < 60; ++i) text.push_back(i % 3);
  lookup.update(text);
  CHECK(drafted(lookup, text) == (Tokens{0, 1, 2, 0, 1, 2, 0}));
}

TEST(lookup_prefers_the_latest_of_several_places) {
  PromptLookup lookup;
  const Tokens text = {1, 2, 3, 10, 90, 91, 1, 2, 3, 20, 92, 93, 1, 2, 3};
  lookup.update(text);
  const Tokens draft = drafted(lookup, text);
  CHECK(!draft.empty() && draft[0] == 20);
}

TEST(lookup_has_no_guess_without_repetition) {
  PromptLookup lookup;
  const Record record = follow(lookup, {}, counting(0, 500));
  CHECK(record.drafts == 0);
  PromptLookup empty;
  empty.update({});
  CHECK(drafted(empty, {}).empty());
}

TEST(lookup_stops_drafting_where_guesses_are_wrong) {
  std::mt19937 random(7);
  PromptLookup lookup;
  Tokens text;  // every run of three occurs often, and says nothing about what follows
  for (int i = 0; i < 4000; ++i)
    text.push_back(std::uniform_int_distribution<int32_t>(0, 19)(random));
  const Record record = follow(lookup, {}, text);
  CHECK(record.drafts < 400);
}

TEST(lookup_does_not_depend_on_how_tokens_arrive) {
  std::mt19937 random(3);
  Tokens text;
  for (int i = 0; i < 2000; ++i)
    text.push_back(std::uniform_int_distribution<int32_t>(0, 3)(random));
  PromptLookup whole, by_one;
  whole.update(text);
  Tokens known;
  for (int32_t token : text) {
    known.push_back(token);
    by_one.update(known);
  }
  CHECK(drafted(whole, text) == drafted(by_one, text));
}

TEST(step_estimate_asks_more_of_a_row_in_a_larger_step) {
  CHECK(StepEstimate(1, 0.1).add(0.11) && !StepEstimate(1, 0.1).add(0.09));
  CHECK(StepEstimate(16, 0.1).add(0.65) && !StepEstimate(16, 0.1).add(0.63));
  CHECK(!StepEstimate(1, 1.0).add(0.99));  // where a row costs a step, none is added
}
