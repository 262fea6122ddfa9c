#include "core/parallel.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/error.h"

namespace qn {
namespace {

constexpr int kSpinPauses = 2000;  // about 30 to 90 microseconds
/// A thread takes this part of an equal share of what is left: chunks are long at first, which
/// keeps streams long, and short at the end, which has all threads finish together.
constexpr int64_t kShareDivisor = 2;

/// A wait longer than this many of the caller's own chunks is a stall: the worker was taken off its
/// CPU. Ticks are those of the time stamp counter, two to four to the nanosecond.
constexpr uint64_t kStallChunks = 4;
constexpr uint64_t kShortestStall = uint64_t{1} << 20;   // ticks; no scheduler's slice is shorter
constexpr uint64_t kFirstAlone = 4, kLongestAlone = 64;  // time without workers, in stalls
constexpr uint64_t kMostAlone = uint64_t{1} << 32;       // ticks

/// The pool whose region this thread is in, and the thread's number there.
thread_local const ThreadPool* current_pool = nullptr;
thread_local int current_thread = 0;

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr,
          nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word, int64_t count) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE,
          static_cast<int>(std::min<int64_t>(count, INT32_MAX)), nullptr, nullptr, 0);
}

/// Returns once ready(word) holds: spins first, then sleeps. Whoever makes it hold stores to `word`
/// first and looks at `sleepers` second; here it is the other way round, so that no wake-up is lost
/// (all four accesses are sequentially consistent). `slept` tells which of the two it was.
template <typename Ready>
uint32_t wait_until(std::atomic<uint32_t>& word, std::atomic<int>& sleepers, Ready ready,
                    bool& slept) {
  uint32_t value;
  slept = false;
  for (int pause = 0; pause < kSpinPauses; ++pause) {
    value = word.load(std::memory_order_acquire);
    if (ready(value)) return value;
    _mm_pause();
  }
  slept = true;
  sleepers.fetch_add(1);
  while (!ready(value = word.load())) futex_wait(word, value);
  sleepers.fetch_sub(1, std::memory_order_relaxed);
  return value;
}

/// Decides when the caller is better off alone. A worker whose CPU another process wants, or whose
/// quota is used up, holds a chunk while it does not run, and the region waits. After such a stall
/// the caller works alone for some times as long; longer if it happens again soon after.
class StallGuard {
 public:
  bool alone() const { return alone_until_ != 0 && __rdtsc() < alone_until_; }

  /// The caller computed `chunks` chunks from `begin` to `end` and then slept until now.
  void slept(uint64_t begin, uint64_t end, int64_t chunks) {
    const uint64_t now = __rdtsc(), stall = now - end;
    if (chunks == 0 || stall < kShortestStall) return;
    if (stall < kStallChunks * (end - begin) / static_cast<uint64_t>(chunks)) return;
    const bool again = alone_until_ != 0 && end - alone_until_ < last_alone_;
    factor_ = again ? std::min(2 * factor_, kLongestAlone) : kFirstAlone;
    last_alone_ = std::min(factor_ * stall, kMostAlone);
    alone_until_ = now + last_alone_;
  }

 private:
  uint64_t alone_until_ = 0, last_alone_ = 0, factor_ = kFirstAlone;
};

}  // namespace

struct ThreadPool::State {
  static constexpr uint32_t kClosed = 1u << 31;

  alignas(64) std::atomic<uint32_t> region{0};  // counts regions; a change wakes the workers
  /// Workers inside the region, and kClosed once nobody may join any more. The fields below change
  /// only while this is kClosed alone.
  alignas(64) std::atomic<uint32_t> members{kClosed};
  alignas(64) std::atomic<int64_t> next{0};  // first element not handed out yet
  alignas(64) RangeFn fn = nullptr;
  void* body = nullptr;
  int64_t n = 0;
  int64_t grain = 1;
  int64_t divisor = 1;  // of what is left
  std::atomic<bool> failed{false};
  std::exception_ptr failure;  // written by the thread that sets `failed`

  std::atomic<int> sleeping_workers{0};
  std::atomic<int> sleeping_callers{0};
  std::atomic<bool> stop{false};
  std::mutex caller;
  StallGuard stalls;  // used by the caller
  std::vector<std::thread> workers;

  ~State() { stop_workers(); }

  void start_workers(const ThreadPool* pool, int threads) {
    try {
      while (static_cast<int>(workers.size()) < threads - 1) {
        const int thread = static_cast<int>(workers.size()) + 1;
        workers.emplace_back([this, pool, thread] { work(pool, thread); });
      }
    } catch (const std::system_error& error) {
      const size_t started = workers.size() + 1;
      stop_workers();
      QN_FAIL("[threads] the system started ", started, " threads, expected ", threads, ": ",
              error.what());
    }
  }

  void stop_workers() {
    stop.store(true);
    wake_workers(INT32_MAX);
    for (std::thread& worker : workers) worker.join();
    workers.clear();
    stop.store(false);
  }

  void wake_workers(int64_t count) {
    region.fetch_add(1);
    if (sleeping_workers.load() > 0) futex_wake(region, count);
  }

  bool join() {
    uint32_t count = members.load(std::memory_order_relaxed);
    while ((count & kClosed) == 0) {
      if (members.compare_exchange_weak(count, count + 1, std::memory_order_acquire,
                                        std::memory_order_relaxed)) {
        return true;
      }
    }
    return false;
  }

  void leave() {
    if (members.fetch_sub(1) == (kClosed | 1) && sleeping_callers.load() > 0) {
      futex_wake(members, INT32_MAX);
    }
  }

  /// Returns how many.
  int64_t take_chunks(int thread) {
    int64_t taken = 0;
    try {
      int64_t begin = next.load(std::memory_order_relaxed);
      while (begin < n) {
        const int64_t end = std::min(n, begin + next_chunk(n - begin));
        if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
        ++taken;
        fn(body, begin, end, thread);
        begin = next.load(std::memory_order_relaxed);
      }
    } catch (...) {
      next.store(n, std::memory_order_relaxed);
      if (!failed.exchange(true)) failure = std::current_exception();
    }
    return taken;
  }

  int64_t next_chunk(int64_t left) const { return std::max(left / divisor, grain) / grain * grain; }

  void work(const ThreadPool* pool, int thread) {
    current_pool = pool;
    current_thread = thread;
    uint32_t seen = 0;
    bool slept;
    for (;;) {
      seen =
          wait_until(region, sleeping_workers, [seen](uint32_t now) { return now != seen; }, slept);
      if (stop.load()) return;
      if (!join()) continue;
      take_chunks(thread);
      leave();
    }
  }

  /// Runs one region; `caller` is held.
  void run_region(int64_t chunks) {
    members.store(0, std::memory_order_release);
    wake_workers(chunks - 1);
    const uint64_t begin = __rdtsc();
    const int64_t taken = take_chunks(0);
    if (members.fetch_or(kClosed, std::memory_order_acq_rel) == 0) return;
    const uint64_t end = __rdtsc();
    bool slept;
    wait_until(members, sleeping_callers, [](uint32_t now) { return now == kClosed; }, slept);
    if (slept) stalls.slept(begin, end, taken);
  }
};

/// Gives every pool of a forked child a fresh State: the workers stayed in the parent, and nobody
/// can tell what they held. The old one is left alone, for good.
struct ForkGuard {
  std::mutex mutex;
  std::vector<ThreadPool*> pools;

  static ForkGuard& instance() {
    static ForkGuard* guard = [] {
      pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); },
                     after_fork);
      return new ForkGuard;  // never destroyed: fork may come during exit
    }();
    return *guard;
  }

  static void after_fork() {
    for (ThreadPool* pool : instance().pools) {
      (void)pool->state_.release();
      pool->state_ = std::make_unique<ThreadPool::State>();
    }
    instance().mutex.unlock();
  }
};

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  QN_CHECK(threads >= 1 && threads <= 1024, "[threads] count is ", threads, ", expected 1 to 1024");
  state_ = std::make_unique<State>();
  state_->start_workers(this, threads);
  ForkGuard& guard = ForkGuard::instance();
  std::lock_guard<std::mutex> lock(guard.mutex);
  guard.pools.push_back(this);
}

ThreadPool::~ThreadPool() {
  ForkGuard& guard = ForkGuard::instance();
  std::lock_guard<std::mutex> lock(guard.mutex);
  std::erase(guard.pools, this);
}

void ThreadPool::run(int64_t n, int64_t grain, RangeFn fn, void* body) {
  QN_CHECK(grain >= 1, "[threads] grain is ", grain, ", expected at least 1");
  if (n <= 0) return;
  if (current_pool == this) return fn(body, 0, n, current_thread);
  if (threads_ == 1 || n <= grain) return fn(body, 0, n, 0);
  std::lock_guard<std::mutex> one_region(state_->caller);
  State& state = *state_;
  if (state.workers.empty()) state.start_workers(this, threads_);
  state.grain = grain;
  state.divisor = kShareDivisor * threads_;
  state.fn = fn;
  state.body = body;
  state.n = n;
  state.next.store(0, std::memory_order_relaxed);
  const ThreadPool* outer_pool = std::exchange(current_pool, this);
  const int outer_thread = std::exchange(current_thread, 0);
  if (state.stalls.alone()) {
    state.take_chunks(0);
  } else {
    state.run_region((n + grain - 1) / grain);
  }
  current_pool = outer_pool;
  current_thread = outer_thread;
  if (state.failed.exchange(false)) std::rethrow_exception(std::exchange(state.failure, nullptr));
}

}  // namespace qn
