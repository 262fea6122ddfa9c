// Thread pool: one parallel region at a time, chunks of falling size handed out dynamically, no
// OpenMP.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

namespace qn {

/// Workers spin for some tens of microseconds after a region, which covers the gaps between the ops
/// of one token, then sleep on a futex, so that an idle pool uses no CPU and a throttled one does
/// not burn its quota. A region waits only for the workers that joined it: on a busy machine a
/// worker that was not scheduled in time costs nothing, and after one was taken off its CPU amid a
/// chunk the caller works alone for a while, so that neither a busy core nor a quota below the
/// number of threads makes it slower than one thread. After fork() the child's pool starts
/// workers of its own.
class ThreadPool {
 public:
  /// `threads` counts the calling thread. Throws ArgumentError unless it is from 1 to 1024, Error
  /// when the system refuses to start that many.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  /// Calls fn(begin, end, thread) for disjoint ranges that cover [0, n); `thread` is in
  /// [0, threads()) and no two calls run under the same number at once. Ranges start at multiples
  /// of `grain` (at least 1). Several threads may call this; their regions run one after the other.
  /// A region started from inside a region of this pool runs on the calling thread. When fn throws,
  /// ranges not started yet are dropped and the first exception reaches the caller.
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
  friend struct ForkGuard;

  void run(int64_t n, int64_t grain, RangeFn fn, void* body);

  int threads_;
  std::unique_ptr<State> state_;
};

}  // namespace qn
