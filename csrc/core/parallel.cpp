#include "core/parallel.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "core/error.h"

namespace qn {
namespace {

constexpr int kSpinPauses = 2000;  // about 30 to 90 microseconds
constexpr int64_t kChunksPerThread =
    4;  // enough to balance a disturbed core, few enough to keep long streams

thread_local bool inside_region = false;

std::atomic<uint32_t> fork_count{0};

void watch_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1); });
  (void)registered;
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr,
          nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr,
          nullptr, 0);
}

/// Waits until `word` differs from `value`: spins first, then sleeps.
void wait_for_change(std::atomic<uint32_t>& word, uint32_t value, std::atomic<int>& sleepers) {
  for (int pause = 0; pause < kSpinPauses; ++pause) {
    if (word.load(std::memory_order_acquire) != value) return;
    _mm_pause();
  }
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  while (word.load(std::memory_order_seq_cst) == value) futex_wait(word, value);
  sleepers.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace

struct ThreadPool::State {
  alignas(64) std::atomic<uint32_t> region{0};    // counts regions; a change wakes the workers
  alignas(64) std::atomic<uint32_t> finished{0};  // counts regions that every worker has left
  alignas(64) std::atomic<int> running{0};        // workers still inside the current region
  alignas(64) std::atomic<int64_t> next{0};       // first element not handed out yet
  std::atomic<int> sleeping_workers{0};
  std::atomic<int> sleeping_callers{0};
  std::atomic<bool> stop{false};
  RangeFn fn = nullptr;
  void* body = nullptr;
  int64_t n = 0;
  int64_t chunk = 1;
  uint32_t forks_seen = 0;
  std::mutex caller;
  std::vector<std::thread> workers;

  void take_chunks(int thread) {
    for (;;) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= n) return;
      fn(body, begin, std::min(n, begin + chunk), thread);
    }
  }

  void work(int thread) {
    inside_region = true;
    uint32_t seen = 0;
    for (;;) {
      wait_for_change(region, seen, sleeping_workers);
      seen = region.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_relaxed)) return;
      take_chunks(thread);
      if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        finished.store(seen, std::memory_order_seq_cst);
        if (sleeping_callers.load(std::memory_order_seq_cst) > 0) futex_wake_all(finished);
      }
    }
  }

  void open_region() {
    region.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_workers.load(std::memory_order_seq_cst) > 0) futex_wake_all(region);
  }
};

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  QN_CHECK(threads >= 1 && threads <= 1024, "[threads] count is ", threads, ", expected 1 to 1024");
  watch_forks();
  start_workers();
}

ThreadPool::~ThreadPool() {
  if (state_->forks_seen != fork_count.load()) {
    // The workers stayed in the parent process: there is nothing to join.
    for (std::thread& worker : state_->workers) worker.detach();
    return;
  }
  state_->stop.store(true);
  state_->open_region();
  for (std::thread& worker : state_->workers) worker.join();
}

void ThreadPool::start_workers() {
  state_ = std::make_unique<State>();
  state_->forks_seen = fork_count.load();
  for (int thread = 1; thread < threads_; ++thread) {
    state_->workers.emplace_back([state = state_.get(), thread] { state->work(thread); });
  }
}

void ThreadPool::run(int64_t n, int64_t grain, RangeFn fn, void* body) {
  if (n <= 0) return;
  if (threads_ == 1 || inside_region || n <= grain) return fn(body, 0, n, 0);
  if (state_->forks_seen != fork_count.load()) {
    for (std::thread& worker : state_->workers) worker.detach();
    state_.release();  // the child cannot tell which locks its parent's workers held
    start_workers();
  }
  std::lock_guard<std::mutex> one_region(state_->caller);
  State& state = *state_;
  const int64_t wanted = (n + threads_ * kChunksPerThread - 1) / (threads_ * kChunksPerThread);
  state.chunk = (wanted + grain - 1) / grain * grain;
  state.fn = fn;
  state.body = body;
  state.n = n;
  state.next.store(0, std::memory_order_relaxed);
  state.running.store(threads_ - 1, std::memory_order_relaxed);
  const uint32_t finished_before = state.finished.load(std::memory_order_relaxed);
  state.open_region();
  inside_region = true;
  state.take_chunks(0);
  inside_region = false;
  wait_for_change(state.finished, finished_before, state.sleeping_callers);
}

}  // namespace qn
