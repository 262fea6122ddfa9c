// Exact GEMM with 4-bit weights: out = x W^T (+ bias), int32 dot products per group of 32
// (vec_panel_gemm.h); with many tokens at the level amx the same on tiles (amx_panel_gemm.h).
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec_panel_gemm.h"
#if QN_ISA_LEVEL >= 4
#include "kernels/cpu/amx_panel_gemm.h"
#endif

namespace qn::cpu::QN_ISA {
namespace {

template <class Format>
void run(const GemmQuantizedArgs& args, int64_t begin, int64_t end) {
#if QN_ISA_LEVEL >= 4
  if (args.x.tokens >= kTileTokens) return gemm_panels_tiles<Format>(args, begin, end);
#endif
  gemm_panels<Format>(args, begin, end);
}

}  // namespace

void gemm_int4(const GemmQuantizedArgs& args, int64_t begin, int64_t end) {
  if (args.format == WeightFormat::Int4) return run<Int4Panel>(args, begin, end);
  run<Int4SymmetricPanel>(args, begin, end);
}

}  // namespace qn::cpu::QN_ISA
