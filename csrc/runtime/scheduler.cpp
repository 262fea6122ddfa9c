#include "runtime/scheduler.h"

#include <algorithm>

namespace qn::rt {

Scheduler::Scheduler(PagePool& pool, int64_t page_tokens, int64_t max_step_tokens,
                     int64_t max_running)
    : pool_(pool),
      page_tokens_(page_tokens),
      max_step_tokens_(max_step_tokens),
      max_running_(max_running) {}

void Scheduler::add(SequenceState* sequence) { waiting_.push_back(sequence); }

void Scheduler::remove(SequenceState* sequence) {
  std::erase(running_, sequence);
  std::erase(waiting_, sequence);
  release_pages(*sequence);
}

void Scheduler::release_pages(SequenceState& sequence) {
  for (int32_t page : sequence.pages) pool_.release(page);
  sequence.pages.clear();
  sequence.computed = 0;
}

/// Makes room for the first `tokens` tokens, or takes no page at all.
bool Scheduler::reserve(SequenceState& sequence, int64_t tokens) {
  const int64_t wanted = pages_for(tokens);
  if (wanted - static_cast<int64_t>(sequence.pages.size()) > pool_.free()) return false;
  while (static_cast<int64_t>(sequence.pages.size()) < wanted)
    sequence.pages.push_back(*pool_.allocate());
  return true;
}

bool Scheduler::preempt_youngest_after(const SequenceState* sequence) {
  if (running_.back() == sequence) return false;
  SequenceState* youngest = running_.back();
  running_.pop_back();
  release_pages(*youngest);
  waiting_.push_front(youngest);
  return true;
}

void Scheduler::add_chunk(SequenceState* sequence, std::vector<Chunk>& chunks) {
  const int64_t count = std::min(sequence->length - sequence->computed, budget_);
  if (count <= 0) return;
  while (!reserve(*sequence, sequence->computed + count)) {
    if (!preempt_youngest_after(sequence)) return;
    std::erase_if(chunks, [&](const Chunk& chunk) { return chunk.sequence->pages.empty(); });
  }
  chunks.push_back({sequence, count});
  budget_ -= count;
}

std::vector<Chunk> Scheduler::schedule() {
  std::vector<Chunk> chunks;
  budget_ = max_step_tokens_;
  for (const bool decoding : {true, false}) {
    for (size_t i = 0; i < running_.size(); ++i) {  // add_chunk may shorten running_ from its end
      SequenceState* sequence = running_[i];
      if ((sequence->length - sequence->computed == 1) == decoding) add_chunk(sequence, chunks);
    }
  }
  while (!waiting_.empty() && budget_ > 0 && static_cast<int64_t>(running_.size()) < max_running_) {
    SequenceState* next = waiting_.front();
    if (!reserve(*next, next->length)) break;
    waiting_.pop_front();
    running_.push_back(next);
    add_chunk(next, chunks);
  }
  return chunks;
}

int64_t Scheduler::extend(Chunk& chunk, int64_t drafts) {
  SequenceState& sequence = *chunk.sequence;
  const int64_t end = sequence.computed + chunk.count;
  const int64_t room =
      (static_cast<int64_t>(sequence.pages.size()) + pool_.free()) * page_tokens_ - end;
  const int64_t granted = std::min({drafts, budget_, room});
  reserve(sequence, end + granted);
  chunk.count += granted;
  budget_ -= granted;
  return granted;
}

void Scheduler::roll_back(SequenceState& sequence, int64_t computed) {
  sequence.computed = computed;
  while (static_cast<int64_t>(sequence.pages.size()) > pages_for(computed)) {
    pool_.release(sequence.pages.back());
    sequence.pages.pop_back();
  }
}

Scheduler::PageCopy Scheduler::fork(SequenceState& to, const SequenceState& from) {
  PageCopy copy;
  const bool partial = from.computed % page_tokens_ != 0;
  const size_t full = static_cast<size_t>(from.computed / page_tokens_);
  if (partial && pool_.free() == 0) return copy;
  to.pages.assign(from.pages.begin(), from.pages.begin() + static_cast<std::ptrdiff_t>(full));
  for (int32_t page : to.pages) pool_.share(page);
  if (partial) {
    copy = {*pool_.allocate(), from.pages[full]};
    to.pages.push_back(copy.to);
  }
  to.computed = from.computed;
  return copy;
}

}  // namespace qn::rt
