// What this host can run: instruction-set level (CPUID, operating-system state, AMX permission) and
// usable threads.
#pragma once
#include <string>

namespace qn {

/// Ordered levels; each is a bundle and includes the ones before it. Avx2 = AVX2 + FMA + F16C;
/// Avx512 = F + BW + VL + DQ + VNNI; Avx512Bf16 = Avx512 + AVX512_BF16 (AMD from Zen 4 on); Amx =
/// that + AVX512_FP16 + GFNI + AMX tiles (int8, bf16).
enum class Isa : int { Scalar, Avx2, Avx512, Avx512Bf16, Amx };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

/// Throws ArgumentError for a name that is not a level.
Isa isa_from_name(const std::string& name);

/// The highest level that this host can run; for Amx the process has asked the kernel for tile data
/// once.
Isa host_isa();

/// Places of memory, 2 or 4, that one core reads by turns the fastest. It depends on how the
/// processor reads ahead: 4 on Intel's (a Xeon with AMX), with software prefetches; 2 on AMD's
/// (Zen 4), which want ascending lines and no software prefetches. What was measured on these two
/// follows it, too: from how many tokens on weights are folded, what a token costs.
int memory_streams();

/// For tests and measurements. Throws ArgumentError unless count is 2 or 4.
void set_memory_streams(int count);

/// How the number of threads was decided.
struct ThreadBudget {
  int affinity;  // CPUs this process may run on
  int cores;     // distinct physical cores among them
  int quota;     // CPUs' worth of time the cgroup grants, rounded down, at least 1; 0 = no limit
  int override_value;  // QN_THREADS, 0 = not set
  int threads;         // the decision
};

ThreadBudget thread_budget();

/// Whole CPUs granted by the tightest cgroup (v1 or v2) limit between this process and the root, at
/// least 1; 0 = no limit. `root` is put before /proc and /sys.
int cgroup_cpu_quota(const std::string& root = "");

}  // namespace qn
