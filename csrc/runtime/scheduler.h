// Which tokens run in the next step. Integer logic: no tensors, no model.
#pragma once
#include <cstdint>
#include <deque>
#include <vector>

#include "runtime/page_pool.h"
#include "runtime/sequence.h"

namespace qn::rt {

/// `count` tokens of a sequence, starting at its `computed`; drafts may follow the tokens it has.
struct Chunk {
  SequenceState* sequence;
  int64_t count;
};

/// Continuous batching. Every step runs one token of each decoding sequence and fills the rest of
/// the token budget with prompts, oldest first, in chunks. When pages run out the youngest running
/// sequence gives its pages back and starts over later (its tokens are kept, so its result does not
/// change).
class Scheduler {
 public:
  /// A sequence may grow to at most pool.total() * page_tokens tokens.
  Scheduler(PagePool& pool, int64_t page_tokens, int64_t max_step_tokens, int64_t max_running);

  /// Queues a sequence; the scheduler keeps the pointer until remove().
  void add(SequenceState* sequence);
  /// Takes a sequence out, wherever it is, and releases its pages.
  void remove(SequenceState* sequence);
  bool idle() const { return running_.empty() && waiting_.empty(); }

  /// The chunks of the next step; empty only when idle. The caller runs them and advances
  /// `computed`.
  std::vector<Chunk> schedule();

  /// Lets a chunk of this step take up to `drafts` tokens beyond the sequence's length, as far as
  /// the token budget and free pages reach; returns how many.
  int64_t extend(Chunk& chunk, int64_t drafts);
  /// Forgets what was computed beyond the first `computed` tokens, and frees the pages.
  void roll_back(SequenceState& sequence, int64_t computed);

  /// Pages of `to` become those of `from`: full pages are shared, a partly filled last one is
  /// copied by the caller when this returns true with `copy` set to {to, from}. Without a free page
  /// for the copy, `to` starts from scratch.
  struct PageCopy {
    int32_t to = -1, from = -1;
  };
  PageCopy fork(SequenceState& to, const SequenceState& from);

 private:
  int64_t pages_for(int64_t tokens) const { return (tokens + page_tokens_ - 1) / page_tokens_; }
  bool reserve(SequenceState& sequence, int64_t tokens);
  void release_pages(SequenceState& sequence);
  bool preempt_youngest_after(const SequenceState* sequence);
  void add_chunk(SequenceState* sequence, std::vector<Chunk>& chunks);

  PagePool& pool_;
  int64_t page_tokens_;
  int64_t max_step_tokens_;
  int64_t budget_ = 0;  // what the last step leaves of max_step_tokens_
  int64_t max_running_;
  std::vector<SequenceState*> running_;  // oldest first
  std::deque<SequenceState*> waiting_;
};

}  // namespace qn::rt
