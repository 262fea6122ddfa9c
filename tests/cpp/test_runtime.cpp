// Property tests of the page pool and the scheduler: random workloads, every invariant after every
// step.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "runtime/page_pool.h"
#include "runtime/scheduler.h"

namespace {

using qn::rt::Chunk;
using qn::rt::PagePool;
using qn::rt::Scheduler;
using qn::rt::SequenceState;

constexpr int64_t kPageTokens = 4;

struct Workload {
  std::mt19937 random;
  PagePool pool;
  int64_t budget;
  Scheduler scheduler;
  std::vector<std::unique_ptr<SequenceState>> live;
  std::map<SequenceState*, int64_t> final_length;  // where each sequence ends
  int64_t longest;

  Workload(unsigned seed, int64_t pages, int64_t budget_, int64_t max_running)
      : random(seed),
        pool(pages),
        budget(budget_),
        scheduler(pool, kPageTokens, budget_, max_running),
        longest(pages * kPageTokens) {}

  int64_t draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  }

  void add() {
    auto sequence = std::make_unique<SequenceState>();
    sequence->length = draw(1, longest - 1);
    final_length[sequence.get()] = draw(sequence->length + 1, longest);
    scheduler.add(sequence.get());
    live.push_back(std::move(sequence));
  }

  void finish(SequenceState* sequence) {
    scheduler.remove(sequence);
    CHECK(sequence->pages.empty());
    final_length.erase(sequence);
    std::erase_if(live, [&](const auto& owned) { return owned.get() == sequence; });
  }

  /// One step; returns how many tokens ran.
  int64_t step() {
    std::vector<Chunk> chunks = scheduler.schedule();
    int64_t tokens = 0;
    std::vector<SequenceState*> done;
    for (Chunk& chunk : chunks) {
      SequenceState& sequence = *chunk.sequence;
      CHECK(chunk.count > 0);
      CHECK(sequence.computed + chunk.count <= sequence.length);
      if (sequence.computed + chunk.count == sequence.length) {
        const int64_t before = chunk.count, wanted = draw(0, 6);
        const int64_t drafts = scheduler.extend(chunk, wanted);
        CHECK(drafts >= 0 && drafts <= wanted && chunk.count == before + drafts);
      }
      tokens += chunk.count;
      CHECK(static_cast<int64_t>(sequence.pages.size()) * kPageTokens >=
            sequence.computed + chunk.count);
    }
    check_pages();
    for (const Chunk& chunk : chunks) {
      SequenceState& sequence = *chunk.sequence;
      sequence.computed += chunk.count;
      if (sequence.computed < sequence.length) continue;
      // One token follows, and as many more as drafts were right.
      const int64_t right = draw(0, sequence.computed - sequence.length);
      sequence.length += 1 + right;
      scheduler.roll_back(sequence, sequence.length - 1);
      CHECK(static_cast<int64_t>(sequence.pages.size()) ==
            (sequence.computed + kPageTokens - 1) / kPageTokens);
      if (sequence.length > final_length.at(&sequence)) done.push_back(&sequence);
    }
    CHECK(tokens <= budget);
    check_pages();
    for (SequenceState* sequence : done) finish(sequence);
    return tokens;
  }

  /// No page is lost, and none belongs to two sequences (this workload does not fork).
  void check_pages() {
    std::vector<bool> used(static_cast<size_t>(pool.total()), false);
    int64_t count = 0;
    for (const auto& sequence : live) {
      for (int32_t page : sequence->pages) {
        CHECK(!used[static_cast<size_t>(page)]);
        used[static_cast<size_t>(page)] = true;
        ++count;
      }
    }
    CHECK(count + pool.free() == pool.total());
  }
};

}  // namespace

TEST(scheduler_finishes_every_sequence_and_leaks_no_page) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    Workload load(seed, 1 + seed % 13, 1 + seed % 7, 1 + seed % 5);
    int64_t to_add = load.draw(1, 20);
    int64_t steps = 0;
    while (to_add > 0 || !load.live.empty()) {
      if (to_add > 0 && load.draw(0, 3) == 0) {
        load.add();
        --to_add;
      }
      if (!load.live.empty() && load.draw(0, 40) == 0) {
        load.finish(
            load.live[static_cast<size_t>(load.draw(0, static_cast<int64_t>(load.live.size()) - 1))]
                .get());
      }
      const bool busy = !load.live.empty();
      const int64_t tokens = load.step();
      CHECK(!busy || tokens > 0);  // a step with work makes progress
      if (++steps > 200000) {
        CHECK(!"the workload ends");
        return;
      }
    }
    CHECK(load.scheduler.idle());
    CHECK(load.pool.free() == load.pool.total());
  }
}

TEST(scheduler_runs_decodes_before_prompts) {
  PagePool pool(100);
  Scheduler scheduler(pool, kPageTokens, 8, 10);
  SequenceState decoding, prompt;
  decoding.length = 3;
  scheduler.add(&decoding);
  CHECK(scheduler.schedule().size() == 1);
  decoding.computed = 3;
  decoding.length = 4;
  prompt.length = 50;
  scheduler.add(&prompt);
  const std::vector<Chunk> chunks = scheduler.schedule();
  CHECK(chunks.size() == 2);
  CHECK(chunks[0].sequence == &decoding && chunks[0].count == 1);
  CHECK(chunks[1].sequence == &prompt && chunks[1].count == 7);
}

TEST(scheduler_preempts_the_youngest) {
  PagePool pool(4);
  Scheduler scheduler(pool, kPageTokens, 64, 10);
  SequenceState old_one, young_one;
  old_one.length = 8;
  young_one.length = 8;
  scheduler.add(&old_one);
  scheduler.add(&young_one);
  for (const Chunk& chunk : scheduler.schedule()) chunk.sequence->computed += chunk.count;
  CHECK(old_one.computed == 8 && young_one.computed == 8 && pool.free() == 0);
  old_one.length = young_one.length = 9;
  const std::vector<Chunk> chunks = scheduler.schedule();
  CHECK(chunks.size() == 1 && chunks[0].sequence == &old_one);
  CHECK(young_one.pages.empty() && young_one.computed == 0 && young_one.length == 9);
}

TEST(fork_shares_full_pages_and_copies_the_last) {
  PagePool pool(10);
  Scheduler scheduler(pool, kPageTokens, 64, 10);
  SequenceState parent, child;
  parent.length = 10;
  scheduler.add(&parent);
  for (const Chunk& chunk : scheduler.schedule()) chunk.sequence->computed += chunk.count;
  const Scheduler::PageCopy copy = scheduler.fork(child, parent);
  CHECK(child.computed == 10 && child.pages.size() == 3);
  CHECK(child.pages[0] == parent.pages[0] && child.pages[1] == parent.pages[1]);
  CHECK(copy.from == parent.pages[2] && copy.to == child.pages[2] && copy.to != copy.from);
  scheduler.remove(&parent);
  CHECK(pool.free() == 7);  // the child still holds its three
  scheduler.remove(&child);
  CHECK(pool.free() == 10);
}

TEST(drafts_take_only_what_is_left) {
  PagePool pool(2);
  Scheduler scheduler(pool, kPageTokens, 6, 10);
  SequenceState first, second;
  first.length = second.length = 2;
  scheduler.add(&first);
  scheduler.add(&second);
  std::vector<Chunk> chunks = scheduler.schedule();
  CHECK(chunks.size() == 2);
  CHECK(scheduler.extend(chunks[0], 5) == 2);  // the budget of 6 leaves 2, and no page is free
  CHECK(chunks[0].count == 4 && first.pages.size() == 1);
  CHECK(scheduler.extend(chunks[1], 1) == 0);
  first.computed = 4;
  scheduler.roll_back(first, 2);
  CHECK(first.computed == 2 && first.pages.size() == 1 && pool.free() == 0);
}

TEST(rolled_back_drafts_return_their_pages) {
  PagePool pool(3);
  Scheduler scheduler(pool, kPageTokens, 64, 10);
  SequenceState sequence;
  sequence.length = 3;
  scheduler.add(&sequence);
  std::vector<Chunk> chunks = scheduler.schedule();
  CHECK(scheduler.extend(chunks[0], 50) == 9);  // three pages of four tokens
  CHECK(chunks[0].count == 12 && pool.free() == 0);
  sequence.computed = 12;
  scheduler.roll_back(sequence, 4);
  CHECK(sequence.pages.size() == 1 && pool.free() == 2);
}

TEST(fork_without_a_free_page_starts_over) {
  PagePool pool(1);
  Scheduler scheduler(pool, kPageTokens, 64, 10);
  SequenceState parent, child;
  parent.length = 3;
  scheduler.add(&parent);
  for (const Chunk& chunk : scheduler.schedule()) chunk.sequence->computed += chunk.count;
  const Scheduler::PageCopy copy = scheduler.fork(child, parent);
  CHECK(copy.to == -1 && child.computed == 0 && child.pages.empty());
}
