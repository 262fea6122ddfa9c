#include "ops/probe.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/error.h"
#include "kernels/cpu/dispatch.h"

namespace qn::ops {
namespace {

constexpr double kSecondsPerProbe = 0.15;
constexpr int64_t kIterations = 50'000;  // one task takes some tenths of a millisecond
constexpr int64_t kTasksPerThread = 4;
constexpr int kPasses = 3;

/// Best rate (work per second) of passes over `tasks` tasks, for about kSecondsPerProbe.
double best_rate(ProbeArgs args, int64_t tasks, int64_t grain, const ExecContext& context) {
  std::vector<double> work(static_cast<size_t>(tasks));
  std::vector<float> sink(static_cast<size_t>(tasks));
  args.work = work.data();
  args.sink = sink.data();
  const auto kernel = cpu::active_cpu_kernels().probe;
  double best = 0, elapsed = 0;
  for (int pass = 0; pass < kPasses || elapsed < kSecondsPerProbe; ++pass) {
    std::fill(work.begin(), work.end(), 0.0);
    const auto start = std::chrono::steady_clock::now();
    context.pool.parallel_for(tasks, grain,
                              [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const double done = std::accumulate(work.begin(), work.end(), 0.0);
    if (done == 0) return 0;
    best = std::max(best, done / seconds);
    elapsed += seconds;
  }
  return best;
}

size_t default_read_bytes() {
  constexpr size_t kMiB = size_t{1} << 20;
  const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return std::clamp(4 * static_cast<size_t>(std::max(0L, cache)), 256 * kMiB, 1024 * kMiB);
}

}  // namespace

Peaks measure_peaks(size_t read_bytes, const ExecContext& context) {
  Peaks peaks{};
  ProbeArgs args{};
  args.iterations = kIterations;
  const int64_t tasks = kTasksPerThread * context.pool.threads();
  const auto measure = [&](ProbeKind kind) {
    args.kind = kind;
    return best_rate(args, tasks, 1, context);
  };
  peaks.fma_f32 = measure(ProbeKind::FmaF32);
  peaks.dot_int8 = measure(ProbeKind::DotInt8);
  peaks.dot_bf16 = measure(ProbeKind::DotBf16);
  peaks.tile_int8 = measure(ProbeKind::TileInt8);
  peaks.tile_bf16 = measure(ProbeKind::TileBf16);

  const int64_t blocks =
      static_cast<int64_t>(read_bytes > 0 ? read_bytes : default_read_bytes()) / kProbeBlockBytes;
  QN_CHECK(blocks >= 1, "[measure_peaks] read_bytes is ", read_bytes, ", expected at least ",
           kProbeBlockBytes);
  peaks.read_bytes = static_cast<size_t>(blocks * kProbeBlockBytes);
  const HostBuffer buffer(peaks.read_bytes);
  char* data = static_cast<char*>(buffer.data());
  // Untouched pages would all be the one zero page, read from the cache.
  context.pool.parallel_for(blocks, 512, [&](int64_t begin, int64_t end, int) {
    std::memset(data + begin * kProbeBlockBytes, 0,
                static_cast<size_t>((end - begin) * kProbeBlockBytes));
  });
  args.kind = ProbeKind::ReadStreams;
  args.data = data;
  for (const int streams : {1, 2, 4}) {
    args.streams = streams;
    peaks.read_bandwidth = std::max(peaks.read_bandwidth, best_rate(args, blocks, 4, context));
  }
  return peaks;
}

}  // namespace qn::ops
