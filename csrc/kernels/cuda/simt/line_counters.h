// Traffic of single instructions.
#pragma once
#include <cstdint>
#include <unordered_map>

namespace qn::simt {

struct LineCounters {
  uint64_t requests;      // executions by a warp
  uint64_t units;         // sectors (global) or wavefronts (shared)
  uint64_t units_needed;  // if the same bytes were packed
  uint64_t bytes;         // distinct ones within each request; global only
  bool shared, write;
};

/// By return address; counted since the last clear.
const std::unordered_map<const void*, LineCounters>& line_counters();
/// Clears these and the machine's counters.
void clear_counters();

}  // namespace qn::simt
