// Which level's kernels run.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "core/cpu_info.h"
#include "kernels/cpu/kernels.h"

namespace qn::cpu {

/// The kernels in use: the level named by QN_ISA, else the host's best that was built.
const CpuKernels& active_cpu_kernels();
Isa active_isa();

/// Switches the level of the whole process (tests and benchmarks); throws ArgumentError when the
/// host or the build does not have it. Not to be called while a forward step runs.
void set_active_isa(Isa isa);

/// Levels compiled into this library, ascending.
std::vector<Isa> built_isas();

/// For each op the level that provides it when `isa` is active, as {op, level} in table order. Ops
/// that neither this level nor one below has are left out.
std::vector<std::pair<std::string, Isa>> kernel_sources(Isa isa);

}  // namespace qn::cpu
