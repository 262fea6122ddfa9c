// The entries that this level contributes to the table of kernels.
#include "kernels/cpu/kernels.h"

namespace qn::cpu::QN_ISA {

void fill(CpuKernels& table) {
#if QN_ISA_LEVEL <= 2
  table.rms_norm = rms_norm;
  table.kv_append = kv_append;
  table.rope = rope;
  table.swiglu = swiglu;
  table.rms_norm_bwd = rms_norm_bwd;
  table.rms_norm_bwd_weight = rms_norm_bwd_weight;
  table.swiglu_bwd = swiglu_bwd;
  table.softmax_xent = softmax_xent;
  table.squared_norm = squared_norm;
  table.adamw = adamw;
  table.gather = gather;
  table.block_max = block_max;
  table.block_exp_sum = block_exp_sum;
  table.packed_attention_bwd_sum = packed_attention_bwd_sum;
  table.gemm_f32 = gemm_f32;
  table.quantize_activations = quantize_activations;
  table.fold_activations = fold_activations;
  table.gemm_int8 = gemm_int8;
  table.decode_source = decode_source;
  table.repack = repack;
  table.quantize = quantize;
#elif QN_ISA_LEVEL >= 4
  table.matmul_pack = matmul_pack;
  table.matmul = matmul;
#endif
#if QN_ISA_LEVEL >= 3
  table.gemm_bf16_pack_x = gemm_bf16_pack_x;
#endif
#if QN_ISA_LEVEL != 0 && QN_ISA_LEVEL != 3
  table.gemm_folded = gemm_folded;
  table.gated_gemm_folded = gated_gemm_folded;
#endif
#if QN_ISA_LEVEL != 3
  table.packed_attention = packed_attention;
  table.packed_attention_bwd = packed_attention_bwd;
  table.gemm_int8_grouped = gemm_int8_grouped;
  table.gemm_int4 = gemm_int4;
#endif
  table.probe = probe;
  table.gemm_bf16 = gemm_bf16;
  table.gemm_bf16_workspace = gemm_bf16_workspace;
  table.attention = attention;
  table.attention_merge = attention_merge;
}

}  // namespace qn::cpu::QN_ISA
