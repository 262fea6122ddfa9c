// Every environment variable that the native library reads, with its default and its meaning.
#pragma once
#include <optional>
#include <string>

namespace qn::env {

/// QN_ISA: highest instruction-set level to use (scalar, avx2, avx512, amx). Default: the host's
/// best.
std::optional<std::string> isa();

/// QN_THREADS: number of threads, 1 to 1024. Default: affinity ∩ cgroup CPU quota ∩ physical cores.
/// Throws ArgumentError when it is not such a number.
std::optional<int> threads();

/// QN_CUDA_GRAPHS: 0 runs the decoding steps of a GPU kernel by kernel. Default: captured and
/// replayed as graphs. Throws ArgumentError when it is not 0 or 1.
bool cuda_graphs();

}  // namespace qn::env
