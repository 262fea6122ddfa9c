// Thread pool: one parallel region at a time, chunks handed out dynamically, no OpenMP.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace qn {

/// Workers spin for some tens of microseconds after a region, which covers the gaps between the ops
/// of one token, then sleep on a futex, so that an idle pool uses no CPU and a throttled one does
/// not burn its quota.
class ThreadPool {
 public:
  /// `threads` counts the calling thread; throws ArgumentError unless it is from 1 to 1024.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  /// Calls fn(begin, end, thread) for disjoint ranges that cover [0, n); `thread` is in [0,
  /// threads()). Ranges start at multiples of `grain`. fn must not throw. Regions started from
  /// inside a region run on the calling thread.
  template <typename Fn>
  void parallel_for(int64_t n, int64_t grain, Fn&& fn) {
    using Body = std::remove_reference_t<Fn>;
    run(
        n, grain,
        [](void* body, int64_t begin, int64_t end, int thread) {
          (*static_cast<Body*>(body))(begin, end, thread);
        },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }

 private:
  using RangeFn = void (*)(void* body, int64_t begin, int64_t end, int thread);
  struct State;

  void run(int64_t n, int64_t grain, RangeFn fn, void* body);
  void start_workers();

  int threads_;
  std::unique_ptr<State> state_;
};

}  // namespace qn
