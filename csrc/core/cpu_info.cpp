#include "core/cpu_info.h"

#include <cpuid.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <utility>

#include "core/env.h"
#include "core/error.h"

namespace qn {
namespace {

constexpr const char* kIsaNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

struct CpuidLeaf {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidLeaf cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidLeaf r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

uint64_t enabled_xstate() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

/// Linux hands out tile data on request only (arch_prctl ARCH_REQ_XCOMP_PERM, feature XTILEDATA).
bool request_amx_permission() {
  constexpr int kRequestPermission = 0x1023;
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa detect() {
  const CpuidLeaf leaf1 = cpuid(1, 0);
  const CpuidLeaf leaf7 = cpuid(7, 0);
  const CpuidLeaf leaf7_1 = cpuid(7, 1);
  constexpr int kOsxsave = 27, kFma = 12, kF16c = 29, kAvx = 28;
  if (!bit(leaf1.ecx, kOsxsave) || !bit(leaf1.ecx, kAvx)) return Isa::Scalar;
  const uint64_t xcr0 = enabled_xstate();
  const bool avx2 =
      (xcr0 & 0x6) == 0x6 && bit(leaf1.ecx, kFma) && bit(leaf1.ecx, kF16c) && bit(leaf7.ebx, 5);
  if (!avx2) return Isa::Scalar;
  const bool avx512 = (xcr0 & 0xE6) == 0xE6 && bit(leaf7.ebx, 16) /* F */ &&
                      bit(leaf7.ebx, 17) /* DQ */ && bit(leaf7.ebx, 30) /* BW */ &&
                      bit(leaf7.ebx, 31) /* VL */ && bit(leaf7.ecx, 11) /* VNNI */;
  if (!avx512) return Isa::Avx2;
  constexpr uint64_t kTileState = (uint64_t{1} << 17) | (uint64_t{1} << 18);
  if (!bit(leaf7_1.eax, 5) /* AVX512_BF16 */) return Isa::Avx512;
  const bool amx = (xcr0 & kTileState) == kTileState && bit(leaf7.edx, 23) /* AVX512_FP16 */ &&
                   bit(leaf7.ecx, 8) /* GFNI */ && bit(leaf7.edx, 22) /* AMX-BF16 */ &&
                   bit(leaf7.edx, 24) /* AMX-TILE */ && bit(leaf7.edx, 25) /* AMX-INT8 */ &&
                   request_amx_permission();
  return amx ? Isa::Amx : Isa::Avx512Bf16;
}

int count_cores(const cpu_set_t& affinity) {
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &affinity)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = std::to_string(cpu);
    cores.insert(siblings);
  }
  return std::max<int>(1, static_cast<int>(cores.size()));
}

std::atomic<int>& streams() {
  static std::atomic<int> count = [] {
    const CpuidLeaf vendor = cpuid(0, 0);  // "AuthenticAMD" in ebx, edx, ecx
    const bool amd =
        vendor.ebx == 0x68747541 && vendor.edx == 0x69746e65 && vendor.ecx == 0x444d4163;
    return amd ? 2 : 4;
  }();
  return count;
}

}  // namespace

const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

Isa isa_from_name(const std::string& name) {
  for (int level = 0; level < kIsaCount; ++level) {
    if (name == kIsaNames[level]) return static_cast<Isa>(level);
  }
  throw ArgumentError("[isa] level is '" + name +
                      "', expected one of scalar, avx2, avx512, "
                      "avx512_bf16, amx");
}

Isa host_isa() {
  static const Isa isa = detect();
  return isa;
}

int memory_streams() { return streams().load(std::memory_order_relaxed); }

void set_memory_streams(int count) {
  QN_CHECK(count == 2 || count == 4, "[streams] count is ", count, ", expected 2 or 4");
  streams().store(count, std::memory_order_relaxed);
}

ThreadBudget thread_budget() {
  ThreadBudget budget{};
  cpu_set_t affinity;
  CPU_ZERO(&affinity);
  if (sched_getaffinity(0, sizeof affinity, &affinity) == 0) {
    budget.affinity = CPU_COUNT(&affinity);
    budget.cores = count_cores(affinity);
  } else {
    budget.affinity = budget.cores = std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
  }
  budget.quota = cgroup_cpu_quota();
  budget.override_value = env::threads().value_or(0);
  budget.threads = std::min(budget.affinity, budget.cores);
  if (budget.quota > 0) budget.threads = std::min(budget.threads, budget.quota);
  if (budget.override_value > 0) budget.threads = budget.override_value;
  return budget;
}

int cgroup_cpu_quota(const std::string& root) {
  double limit = 0;
  const auto apply = [&](double quota, double period) {
    if (quota > 0 && period > 0)
      limit = limit == 0 ? quota / period : std::min(limit, quota / period);
  };
  std::ifstream membership(root + "/proc/self/cgroup");
  for (std::string line; std::getline(membership, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    const bool unified = controllers.empty();
    if (!unified && controllers.find("cpu") == std::string::npos) continue;
    const std::string mount = root + (unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu");
    for (;;) {
      if (unified) {
        std::ifstream file(mount + path + "/cpu.max");
        std::string quota;
        double period = 0;
        if (file >> quota >> period && quota != "max") apply(std::atof(quota.c_str()), period);
      } else {
        double quota = 0, period = 0;
        std::ifstream quota_file(mount + path + "/cpu.cfs_quota_us");
        std::ifstream period_file(mount + path + "/cpu.cfs_period_us");
        if (quota_file >> quota && period_file >> period) apply(quota, period);
      }
      if (path.empty() || path == "/") break;
      path.erase(path.find_last_of('/'));
    }
  }
  return limit == 0 ? 0 : std::max(1, static_cast<int>(limit));
}

}  // namespace qn
