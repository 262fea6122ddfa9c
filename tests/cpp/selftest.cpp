// selftest [test|perf|support]: the C++ tests, without Python.
//   test      every TEST, then every op case at every level of this host (QN_ISA: up to that level)
//   perf      time of each op's model-sized case at every level
//   support   what was built, what this host has, which level serves each op
#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>

#include "check.h"
#include "compare.h"
#include "core/cpu_info.h"
#include "kernels/cpu/dispatch.h"
#include "op_cases.h"

namespace qn::test {
namespace {

std::vector<Isa> levels() {
  std::vector<Isa> result;
  for (Isa isa : cpu::built_isas()) {
    if (isa <= cpu::active_isa()) result.push_back(isa);
  }
  return result;
}

/// `one` has a single thread: whatever it gives, more threads must give bit for bit.
void check_case(const OpCase& c, const std::vector<Isa>& isas, const ExecContext& one,
                const ExecContext& many) {
  std::vector<float> base;
  const std::vector<double> ref = c.reference();
  for (Isa isa : isas) {
    cpu::set_active_isa(isa);
    const std::string name = c.op + " " + c.what + " at " + isa_name(isa);
    try {
      const std::vector<float> out = c.run(one);
      if (isa == Isa::Scalar) base = out;
      const std::string wrong = compare(c.policy, c.narrow, out, ref, base);
      if (!wrong.empty()) fail(__FILE__, __LINE__, name + ": " + wrong);
      const std::vector<float> again = c.run(many);
      const bool same =
          again.size() == out.size() &&
          (out.empty() || std::memcmp(again.data(), out.data(), out.size() * sizeof(float)) == 0);
      if (!same)
        fail(__FILE__, __LINE__,
             name + ": differs with " + std::to_string(many.pool.threads()) + " threads");
    } catch (const std::exception& error) {
      fail(__FILE__, __LINE__, name + ": " + error.what());
    }
  }
}

int run_tests() {
  const std::vector<Isa> isas = levels();
  for (const Test& test : tests()) {
    const int before = failures();
    try {
      test.run();
    } catch (const std::exception& error) {
      fail(__FILE__, __LINE__, std::string(test.name) + " threw " + error.what());
    }
    if (failures() != before) std::printf("FAILED %s\n", test.name);
  }
  ThreadPool single(1), several(3);
  Workspace workspace;
  const std::vector<OpCase> cases = op_cases();
  for (const OpCase& c : cases) {
    workspace.reset();
    check_case(c, isas, {single, workspace}, {several, workspace});
  }
  std::printf("%zu tests, %zu op cases at %zu levels (up to %s): %d failures\n", tests().size(),
              cases.size(), isas.size(), isa_name(isas.back()), failures());
  return failures() == 0 ? 0 : 1;
}

int run_perf() {
  using Clock = std::chrono::steady_clock;
  ThreadPool pool(thread_budget().threads);
  Workspace workspace;
  const std::vector<Isa> isas = levels();
  std::printf("%-14s %-8s %10s %10s %10s  (median of 31, %d threads)\n", "op", "level", "us",
              "GB/s", "GFLOP/s", pool.threads());
  for (const OpCase& c : op_cases()) {
    if (!c.perf) continue;
    const auto body = c.perf();
    for (Isa isa : isas) {
      cpu::set_active_isa(isa);
      std::vector<double> seconds;
      for (int repeat = 0; repeat < 32; ++repeat) {
        workspace.reset();
        const auto start = Clock::now();
        body({pool, workspace});
        const std::chrono::duration<double> taken = Clock::now() - start;
        if (repeat > 0) seconds.push_back(taken.count());
      }
      std::nth_element(seconds.begin(), seconds.begin() + 15, seconds.end());
      std::printf("%-14s %-8s %10.1f %10.2f %10.2f\n", c.op.c_str(), isa_name(isa),
                  seconds[15] * 1e6, c.bytes / seconds[15] * 1e-9, c.flops / seconds[15] * 1e-9);
    }
  }
  return 0;
}

int run_support() {
  std::printf("built ");
  for (Isa isa : cpu::built_isas()) std::printf(" %s", isa_name(isa));
  std::printf("\nhost   %s\nactive %s\n", isa_name(host_isa()), isa_name(cpu::active_isa()));
  for (const auto& [op, isa] : cpu::kernel_sources(cpu::active_isa())) {
    std::printf("  %-20s %s\n", op.c_str(), isa_name(isa));
  }
  const ThreadBudget budget = thread_budget();
  std::printf("threads %d (affinity %d, cores %d, quota %d, QN_THREADS %d)\n", budget.threads,
              budget.affinity, budget.cores, budget.quota, budget.override_value);
  return 0;
}

}  // namespace
}  // namespace qn::test

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "test";
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  try {
    if (mode == "test") return qn::test::run_tests();
    if (mode == "perf") return qn::test::run_perf();
    if (mode == "support") return qn::test::run_support();
  } catch (const qn::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  std::fprintf(stderr, "mode is '%s', expected test, perf or support\n", mode.c_str());
  return 2;
}
