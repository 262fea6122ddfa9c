// The entries that this level contributes to the table of kernels.
#include "kernels/cpu/kernels.h"

namespace qn::cpu::QN_ISA {

void fill(CpuKernels& table) {
#if QN_ISA_LEVEL <= 2
  table.rms_norm = rms_norm;
#endif
  table.probe = probe;
}

}  // namespace qn::cpu::QN_ISA
