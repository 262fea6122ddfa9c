// csrc/core: thread pool, memory, environment, CPU detection; and the overlay of kernel tables.
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "check.h"
#include "core/allocator.h"
#include "core/checksum.h"
#include "core/cpu_info.h"
#include "core/env.h"
#include "core/error.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "kernels/cpu/dispatch.h"

namespace qn::test {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#else
constexpr bool kThreadSanitizer = false;
#endif

/// Sets a variable for one test.
class ScopedEnv {
 public:
  ScopedEnv(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    value != nullptr ? setenv(name, value, 1) : unsetenv(name);
  }
  ~ScopedEnv() { old_ ? setenv(name_, old_->c_str(), 1) : unsetenv(name_); }

 private:
  const char* name_;
  std::optional<std::string> old_;
};

/// Every element of [0, n) exactly once, ranges on grain boundaries, thread numbers in range.
void check_coverage(ThreadPool& pool, int64_t n, int64_t grain) {
  std::vector<std::atomic<int>> visits(static_cast<size_t>(n));
  std::atomic<int> wrong{0};
  pool.parallel_for(n, grain, [&](int64_t begin, int64_t end, int thread) {
    if (begin % grain != 0 || begin >= end || end > n) ++wrong;
    if (thread < 0 || thread >= pool.threads()) ++wrong;
    for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
  });
  CHECK(wrong == 0);
  CHECK(std::all_of(visits.begin(), visits.end(), [](const auto& count) { return count == 1; }));
}

int64_t sum_to(ThreadPool& pool, int64_t n) {
  std::atomic<int64_t> total{0};
  pool.parallel_for(n, 1, [&](int64_t begin, int64_t end, int) {
    int64_t part = 0;
    for (int64_t i = begin; i < end; ++i) part += i;
    total += part;
  });
  return total;
}

TEST(pool_covers_every_range_once) {
  for (int threads = 1; threads <= 8; ++threads) {
    ThreadPool pool(threads);
    CHECK(pool.threads() == threads);
    for (int64_t n : {0, 1, 2, 7, 8, 9, 31, 64, 1000, 4099}) {
      for (int64_t grain : {1, 2, 8, 33, 5000}) check_coverage(pool, n, grain);
    }
  }
}

TEST(pool_refuses_bad_arguments) {
  CHECK_THROWS(ArgumentError, "[threads] count is 0, expected 1 to 1024", ThreadPool pool(0));
  CHECK_THROWS(ArgumentError, "[threads] count is 1025", ThreadPool pool(1025));
  ThreadPool pool(2);
  CHECK_THROWS(ArgumentError, "[threads] grain is 0, expected at least 1",
               pool.parallel_for(4, 0, [](int64_t, int64_t, int) {}));
}

TEST(pool_publishes_results_without_locks) {
  ThreadPool pool(4);
  std::vector<int64_t> squares(1000);
  for (int64_t round = 0; round < 200; ++round) {
    pool.parallel_for(1000, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) squares[static_cast<size_t>(i)] = i * i + round;
    });
    for (int64_t i = 0; i < 1000; ++i) CHECK(squares[static_cast<size_t>(i)] == i * i + round);
  }
}

TEST(pool_runs_many_short_regions) {
  ThreadPool pool(3);
  const int regions = kThreadSanitizer ? 1000 : 5000;
  for (int i = 0; i < regions; ++i) {
    std::atomic<int> visits{0};
    pool.parallel_for(
        5, 1, [&](int64_t begin, int64_t end, int) { visits += static_cast<int>(end - begin); });
    CHECK(visits == 5);
  }
}

TEST(pool_wakes_sleeping_workers) {
  for (int round = 0; round < 5; ++round) {
    ThreadPool pool(4);  // a new one: on a busy machine the round before may have had a stall
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // far beyond the spin
    std::mutex mutex;
    std::set<std::thread::id> used;
    // Four chunks that last until all have begun need four threads.
    std::atomic<int> begun{0};
    pool.parallel_for(16, 4, [&](int64_t, int64_t, int) {
      ++begun;
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (begun < 4 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
      std::lock_guard<std::mutex> lock(mutex);
      used.insert(std::this_thread::get_id());
    });
    CHECK(used.size() == 4);
  }
}

TEST(pool_uses_no_cpu_when_idle) {
  ThreadPool pool(4);
  sum_to(pool, 100);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const std::clock_t before = std::clock();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double cpu_seconds = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
  CHECK(cpu_seconds < 0.05);  // four spinning threads would have used at least 0.2
}

TEST(pool_goes_without_a_stalled_worker_for_a_while) {
  ThreadPool pool(2);
  std::atomic<int> on_worker{0};
  const auto run_with_worker = [&](std::chrono::milliseconds stall) {
    std::atomic<bool> joined{false};
    pool.parallel_for(8, 1, [&](int64_t, int64_t, int thread) {
      if (thread != 0 && !joined.exchange(true)) {
        ++on_worker;
        std::this_thread::sleep_for(stall);
      }
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (!joined && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    });
  };
  run_with_worker(std::chrono::milliseconds(100));
  CHECK(on_worker == 1);
  std::atomic<int> wrong{0};
  pool.parallel_for(100, 1, [&](int64_t, int64_t, int thread) { wrong += thread != 0; });
  CHECK(wrong == 0);
  check_coverage(pool, 1000, 3);
  CHECK_THROWS(ArgumentError, "alone",
               pool.parallel_for(8, 1, [](int64_t, int64_t, int) { QN_CHECK(false, "alone"); }));
  std::this_thread::sleep_for(std::chrono::milliseconds(600));  // four times the stall is over
  run_with_worker(std::chrono::milliseconds(0));
  CHECK(on_worker == 2);
}

TEST(pool_waits_for_slow_worker) {
  ThreadPool pool(2);
  std::atomic<int> done{0};
  pool.parallel_for(2, 1, [&](int64_t, int64_t, int thread) {
    if (thread != 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    ++done;
  });
  CHECK(done == 2);
}

TEST(pool_runs_nested_regions_on_their_thread) {
  ThreadPool pool(4);
  std::atomic<int> inner{0}, wrong{0};
  pool.parallel_for(64, 1, [&](int64_t begin, int64_t end, int outer_thread) {
    const std::thread::id self = std::this_thread::get_id();
    for (int64_t i = begin; i < end; ++i) {
      pool.parallel_for(10, 1, [&](int64_t inner_begin, int64_t inner_end, int thread) {
        if (std::this_thread::get_id() != self || thread != outer_thread) ++wrong;
        inner += static_cast<int>(inner_end - inner_begin);
      });
    }
  });
  CHECK(inner == 640);
  CHECK(wrong == 0);
  check_coverage(pool, 1000, 3);  // and regions are parallel again afterwards
}

TEST(pool_nests_in_another_pool) {
  ThreadPool outer(2), inner(3);
  std::atomic<int64_t> total{0};
  outer.parallel_for(8, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) total += sum_to(inner, 100);
  });
  CHECK(total == 8 * 4950);
}

TEST(pool_serves_two_callers) {
  ThreadPool pool(3);
  std::atomic<int> wrong{0};
  const auto caller = [&] {
    for (int i = 0; i < 500; ++i) {
      if (sum_to(pool, 300) != 300 * 299 / 2) ++wrong;
    }
  };
  std::thread other(caller);
  caller();
  other.join();
  CHECK(wrong == 0);
}

TEST(pool_rethrows_on_the_caller) {
  ThreadPool pool(4);
  for (int64_t bad : {0, 57, 99}) {
    CHECK_THROWS(ArgumentError, "element is bad",
                 pool.parallel_for(100, 1, [&](int64_t begin, int64_t end, int) {
                   QN_CHECK(bad < begin || bad >= end, "element is bad");
                 }));
    check_coverage(pool, 100, 1);
  }
}

TEST(pool_survives_fork) {
  if (kThreadSanitizer) {
    std::printf("pool_survives_fork: left out, ThreadSanitizer has no threads after fork\n");
    return;
  }
  ThreadPool pool(3);
  CHECK(sum_to(pool, 100) == 4950);
  std::atomic<bool> stop{false};
  std::thread busy([&] {  // forks happen while the pool's lock and workers are in use
    while (!stop) sum_to(pool, 1000);
  });
  for (int round = 0; round < 10; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      const bool ok = sum_to(pool, 1000) == 1000 * 999 / 2 && sum_to(pool, 10) == 45;
      _exit(ok ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  stop = true;
  busy.join();
  CHECK(sum_to(pool, 100) == 4950);
}

TEST(pool_destroyed_in_forked_child) {
  if (kThreadSanitizer) return;
  auto pool = std::make_unique<ThreadPool>(3);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    pool.reset();
    _exit(0);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(buffer_is_aligned_and_zero) {
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{4096}, size_t{3} << 20}) {
    HostBuffer buffer(bytes);
    CHECK(buffer.size() == bytes);
    CHECK((buffer.data() == nullptr) == (bytes == 0));
    const size_t alignment = bytes >= size_t{2} << 20 ? size_t{2} << 20 : 64;
    CHECK(reinterpret_cast<uintptr_t>(buffer.data()) % alignment == 0);
    const char* data = static_cast<const char*>(buffer.data());
    CHECK(std::all_of(data, data + bytes, [](char c) { return c == 0; }));
    if (bytes > 0) std::memset(buffer.data(), 1, bytes);
  }
}

TEST(buffer_moves) {
  HostBuffer first(100);
  void* data = first.data();
  HostBuffer second(std::move(first));
  CHECK(second.data() == data && second.size() == 100);
  HostBuffer third(50);
  third = std::move(second);
  CHECK(third.data() == data && third.size() == 100);
}

TEST(buffer_refuses_absurd_sizes) {
  CHECK_THROWS(ArgumentError, "[allocator] size is 18446744073709551615 bytes",
               HostBuffer(SIZE_MAX));
  Workspace workspace;
  CHECK_THROWS(ArgumentError, "[workspace] size is", workspace.allocate_array<float>(-1));
}

TEST(workspace_scopes_release) {
  Workspace workspace;
  void* first = workspace.allocate(100);
  CHECK(reinterpret_cast<uintptr_t>(first) % 64 == 0);
  void* inner;
  {
    Workspace::Scope scope(workspace);
    inner = workspace.allocate(100);
    CHECK(inner != first);
    workspace.allocate(size_t{5} << 20);  // a chunk of its own
  }
  CHECK(workspace.allocate(100) == inner);
  workspace.reset();  // merges the chunks: one block now holds it all
  char* a = workspace.allocate_array<char>(64);
  char* b = workspace.allocate_array<char>(size_t{5} << 20);
  CHECK(b == a + 64);
  CHECK(workspace.allocate(0) != workspace.allocate(0));
}

TEST(tensor_views) {
  Tensor tensor(DType::BF16, {3, 5});
  CHECK(tensor.view().size() == 15 && tensor.view().contiguous());
  CHECK(tensor.view().describe() == "bf16[3, 5]");
  const TensorView rows = tensor.view().rows(1, 3);
  CHECK(rows.shape[0] == 2 && rows.as<bf16>() == tensor.as<bf16>() + 5);
  TensorView column = tensor.view();
  column.shape[1] = 4;
  CHECK(!column.contiguous());
}

TEST(env_threads) {
  {
    ScopedEnv variable("QN_THREADS", "3");
    CHECK(env::threads() == 3);
    CHECK(thread_budget().threads == 3 && thread_budget().override_value == 3);
  }
  for (const char* value : {"0", "-1", "1025", "two", "2x", "1.5", "99999999999999999999"}) {
    ScopedEnv variable("QN_THREADS", value);
    CHECK_THROWS(ArgumentError, std::string("[env] QN_THREADS is '") + value + "'", env::threads());
  }
  ScopedEnv variable("QN_THREADS", "");
  CHECK(!env::threads());
}

TEST(thread_budget_follows_affinity) {
  ScopedEnv variable("QN_THREADS", nullptr);
  cpu_set_t before;
  CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
  const ThreadBudget all = thread_budget();
  CHECK(all.affinity == CPU_COUNT(&before));
  CHECK(all.cores >= 1 && all.cores <= all.affinity);
  CHECK(all.threads == std::min(all.cores, all.quota > 0 ? all.quota : all.cores));
  cpu_set_t one;
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++cpu) {
    if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &one);
  }
  CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
  const ThreadBudget single = thread_budget();
  CHECK(single.affinity == 1 && single.cores == 1 && single.threads == 1);
  CHECK(sched_setaffinity(0, sizeof before, &before) == 0);
}

/// A folder that looks like the root of a system, for cgroup_cpu_quota.
class FakeRoot {
 public:
  FakeRoot()
      : path_(std::filesystem::temp_directory_path() / ("qn_root_" + std::to_string(getpid()))) {}
  ~FakeRoot() { std::filesystem::remove_all(path_); }
  void write(const std::string& name, const std::string& content) {
    std::filesystem::create_directories((path_ / name).parent_path());
    std::ofstream(path_ / name) << content;
  }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

TEST(cgroup_v2_quota) {
  FakeRoot root;
  CHECK(cgroup_cpu_quota(root.path()) == 0);  // no cgroups at all
  root.write("proc/self/cgroup", "0::/user/job\n");
  root.write("sys/fs/cgroup/user/job/cpu.max", "max 100000\n");
  CHECK(cgroup_cpu_quota(root.path()) == 0);
  root.write("sys/fs/cgroup/user/cpu.max", "350000 100000\n");  // the parent is the tighter one
  CHECK(cgroup_cpu_quota(root.path()) == 3);
  root.write("sys/fs/cgroup/user/job/cpu.max", "50000 100000\n");
  CHECK(cgroup_cpu_quota(root.path()) == 1);
  root.write("proc/self/cgroup", "0::/\n");  // a container's own namespace
  root.write("sys/fs/cgroup/cpu.max", "200000 100000\n");
  CHECK(cgroup_cpu_quota(root.path()) == 2);
  root.write("sys/fs/cgroup/cpu.max", "garbage\n");
  CHECK(cgroup_cpu_quota(root.path()) == 0);
}

TEST(cgroup_v1_quota) {
  FakeRoot root;
  root.write("proc/self/cgroup", "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\nbroken\n");
  root.write("sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us", "-1\n");
  root.write("sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us", "100000\n");
  CHECK(cgroup_cpu_quota(root.path()) == 0);
  root.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "250000\n");
  root.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  CHECK(cgroup_cpu_quota(root.path()) == 2);
}

TEST(isa_names) {
  for (int level = 0; level < kIsaCount; ++level) {
    CHECK(isa_from_name(isa_name(static_cast<Isa>(level))) == static_cast<Isa>(level));
  }
  for (const char* name : {"", "AVX2", "sse", "avx512 "}) {
    CHECK_THROWS(ArgumentError, std::string("level is '") + name + "', expected one of",
                 isa_from_name(name));
  }
}

TEST(dispatch_levels) {
  const std::vector<Isa> built = cpu::built_isas();
  CHECK(!built.empty() && built[0] == Isa::Scalar);
  CHECK(std::is_sorted(built.begin(), built.end()));
  const Isa before = cpu::active_isa();
  CHECK(before <= host_isa());
  for (int level = 0; level < kIsaCount; ++level) {
    const Isa isa = static_cast<Isa>(level);
    const bool is_built = std::find(built.begin(), built.end(), isa) != built.end();
    if (isa > host_isa()) {
      CHECK_THROWS(ArgumentError, "but this host supports at most", cpu::set_active_isa(isa));
    } else if (!is_built) {
      CHECK_THROWS(ArgumentError, "could not produce it", cpu::set_active_isa(isa));
    } else {
      cpu::set_active_isa(isa);
      CHECK(cpu::active_isa() == isa);
    }
  }
  cpu::set_active_isa(before);
}

TEST(checksum_is_the_documented_one) {
  unsigned char bytes[1 + 200];
  for (int i = 0; i < 200; ++i) bytes[1 + i] = static_cast<unsigned char>(i);  // not aligned
  CHECK(checksum(bytes + 1, 0) == 0x58a11f08a8644e8f);
  CHECK(checksum("a", 1) == 0x06c4e01b2210d595);
  CHECK(checksum(bytes + 1, 64) == 0x12b355c23430d272);
  CHECK(checksum(bytes + 1, 200) == 0xc33c4c5fd494129c);
}

TEST(dispatch_overlays_levels) {
  for (Isa isa : cpu::built_isas()) {
    for (const auto& [op, source] : cpu::kernel_sources(isa)) {
      CHECK(source <= isa);
      if (isa == Isa::Scalar) CHECK(source == Isa::Scalar);
      if (op == "rms_norm") CHECK(source == std::min(isa, Isa::Avx512));  // amx inherits it
    }
  }
}

TEST(no_level_loses_an_entry) {
  constexpr size_t kEntries = sizeof(cpu::CpuKernels) / sizeof(void (*)());
  const Isa before = cpu::active_isa();
  void (*below[kEntries])() = {};
  for (Isa isa : cpu::built_isas()) {
    if (isa > host_isa()) continue;
    cpu::set_active_isa(isa);
    void (*entries[kEntries])();
    std::memcpy(entries, &cpu::active_cpu_kernels(), sizeof entries);
    CHECK(entries[0] != nullptr);
    for (size_t i = 0; i < kEntries; ++i) CHECK(entries[i] != nullptr || below[i] == nullptr);
    std::memcpy(below, entries, sizeof entries);
  }
  cpu::set_active_isa(before);
}

}  // namespace
}  // namespace qn::test
