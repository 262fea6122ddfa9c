// The CPU kernels of one level as a table of function pointers. A kernel works on rows or tiles
// [begin, end) of what its args describe; it starts no threads, allocates nothing and cannot fail.
#pragma once
#include <stdint.h>

#include "kernels/args.h"

namespace qn::cpu {

struct CpuKernels {
  void (*rms_norm)(const RmsNormArgs&, int64_t begin, int64_t end);  // rows
  void (*probe)(const ProbeArgs&, int64_t begin, int64_t end);       // blocks or tasks
};

}  // namespace qn::cpu

#ifdef QN_ISA
namespace qn::cpu::QN_ISA {

/// Sets the entries that this level implements; the others keep what the level below put there.
void fill(CpuKernels& table);

void rms_norm(const RmsNormArgs& args, int64_t begin, int64_t end);
void probe(const ProbeArgs& args, int64_t begin, int64_t end);

}  // namespace qn::cpu::QN_ISA
#endif
