#include "kernels/cpu/dispatch.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "core/env.h"
#include "core/error.h"

namespace qn::cpu {

namespace scalar {
void fill(CpuKernels&);
}
#ifdef QN_HAVE_AVX2
namespace avx2 {
void fill(CpuKernels&);
}
#endif
#ifdef QN_HAVE_AVX512
namespace avx512 {
void fill(CpuKernels&);
}
#endif
#ifdef QN_HAVE_AVX512_BF16
namespace avx512_bf16 {
void fill(CpuKernels&);
}
#endif
#ifdef QN_HAVE_AMX
namespace amx {
void fill(CpuKernels&);
}
#endif

namespace {

using Fill = void (*)(CpuKernels&);

constexpr std::array<Fill, kIsaCount> kFills = {
    scalar::fill,
#ifdef QN_HAVE_AVX2
    avx2::fill,
#else
    nullptr,
#endif
#ifdef QN_HAVE_AVX512
    avx512::fill,
#else
    nullptr,
#endif
#ifdef QN_HAVE_AVX512_BF16
    avx512_bf16::fill,
#else
    nullptr,
#endif
#ifdef QN_HAVE_AMX
    amx::fill,
#else
    nullptr,
#endif
};

/// Names of the table's entries, in its order.
constexpr const char* kOpNames[] = {
    "rms_norm",
    "rope",
    "swiglu",
    "rms_norm_bwd",
    "rms_norm_bwd_weight",
    "swiglu_bwd",
    "softmax_xent",
    "squared_norm",
    "adamw",
    "gather",
    "block_max",
    "block_exp_sum",
    "probe",
    "gemm_f32",
    "gemm_bf16",
    "gemm_bf16_workspace",
    "gemm_bf16_pack_x",
    "kv_append",
    "attention",
    "attention_merge",
    "packed_attention",
    "packed_attention_bwd",
    "packed_attention_bwd_sum",
    "matmul_pack",
    "matmul",
    "quantize_activations",
    "gemm_int8_grouped",
    "gemm_int4",
    "fold_activations",
    "gemm_int8",
    "gemm_folded",
    "gated_gemm_folded",
    "decode_source",
    "repack",
    "quantize",
};
constexpr size_t kOpCount = sizeof(CpuKernels) / sizeof(void (*)());
static_assert(std::size(kOpNames) == kOpCount, "one name for each entry of CpuKernels");

CpuKernels kernels_at(Isa isa) {
  CpuKernels table{};
  for (int level = 0; level <= static_cast<int>(isa); ++level) {
    if (kFills[level] != nullptr) kFills[level](table);
  }
  return table;
}

struct Active {
  std::array<CpuKernels, kIsaCount> tables;
  std::atomic<int> level;

  Active() {
    for (int i = 0; i < kIsaCount; ++i) tables[i] = kernels_at(static_cast<Isa>(i));
    level = static_cast<int>(initial_level());
  }

  static Isa initial_level() {
    if (const auto name = env::isa()) {
      const Isa wanted = isa_from_name(*name);
      check_available(wanted);
      return wanted;
    }
    Isa best = Isa::Scalar;
    for (Isa isa : built_isas()) {
      if (isa <= host_isa()) best = isa;
    }
    return best;
  }

  static void check_available(Isa wanted) {
    QN_CHECK(wanted <= host_isa(), "[isa] level ", isa_name(wanted),
             " was asked for, but this host supports at most ", isa_name(host_isa()));
    QN_CHECK(kFills[static_cast<int>(wanted)] != nullptr, "[isa] level ", isa_name(wanted),
             " was asked for, but the compiler that built this library could not produce it");
  }
};

Active& active() {
  static Active instance;
  return instance;
}

}  // namespace

const CpuKernels& active_cpu_kernels() {
  return active().tables[active().level.load(std::memory_order_relaxed)];
}

Isa active_isa() { return static_cast<Isa>(active().level.load()); }

void set_active_isa(Isa isa) {
  Active::check_available(isa);
  active().level = static_cast<int>(isa);
}

std::vector<Isa> built_isas() {
  std::vector<Isa> levels;
  for (int level = 0; level < kIsaCount; ++level) {
    if (kFills[level] != nullptr) levels.push_back(static_cast<Isa>(level));
  }
  return levels;
}

std::vector<std::pair<std::string, Isa>> kernel_sources(Isa isa) {
  std::array<Isa, kOpCount> source{};
  std::array<void (*)(), kOpCount> below{};
  for (int level = 0; level <= static_cast<int>(isa); ++level) {
    const CpuKernels table = kernels_at(static_cast<Isa>(level));
    std::array<void (*)(), kOpCount> entries;
    std::memcpy(entries.data(), &table, sizeof table);
    for (size_t op = 0; op < kOpCount; ++op) {
      if (entries[op] != below[op]) source[op] = static_cast<Isa>(level);
    }
    below = entries;
  }
  std::vector<std::pair<std::string, Isa>> sources;
  for (size_t op = 0; op < kOpCount; ++op) {
    if (below[op] != nullptr) sources.emplace_back(kOpNames[op], source[op]);
  }
  return sources;
}

}  // namespace qn::cpu
