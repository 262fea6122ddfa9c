// GEMM with Int8Grouped weights: out = x W^T (+ bias), exact int32 dot products per group of 32
// (vec_panel_gemm.h); with many tokens at the level amx the same on tiles (amx_panel_gemm.h).
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec_panel_gemm.h"
#if QN_ISA_LEVEL >= 4
#include "kernels/cpu/amx_panel_gemm.h"
#endif

namespace qn::cpu::QN_ISA {

void gemm_int8_grouped(const GemmQuantizedArgs& args, int64_t begin, int64_t end) {
#if QN_ISA_LEVEL >= 4
  if (args.x.tokens >= kTileTokens) return gemm_panels_tiles<Int8GroupedPanel>(args, begin, end);
#endif
  gemm_panels<Int8GroupedPanel>(args, begin, end);
}

}  // namespace qn::cpu::QN_ISA
