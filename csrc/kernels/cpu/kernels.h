// The CPU kernels of one level as a table of function pointers. A kernel works on rows or tiles
// [begin, end) of what its args describe; it starts no threads, allocates nothing and cannot fail.
#pragma once
#include <stdint.h>

#include "kernels/args.h"

namespace qn::cpu {

/// Tokens that share a tile of packed activations.
constexpr int64_t kTokenTile = 16;

/// Columns of folded activations are padded to whole tiles.
constexpr int64_t kFoldedTileCols = 64;
constexpr int64_t folded_cols(int64_t cols) {
  return (cols + kFoldedTileCols - 1) / kFoldedTileCols * kFoldedTileCols;
}

/// Where a token's codes are in FoldedActivations: 64 at codes, the next 64 step bytes on, ...
struct FoldedRow {
  int8_t* codes;
  int64_t step;
};
constexpr FoldedRow folded_row(const FoldedActivations& x, int64_t cols, int64_t token) {
  const int64_t tile = token / kTokenTile * kTokenTile;
  const int64_t count = x.tokens - tile < kTokenTile ? x.tokens - tile : kTokenTile;
  return {x.codes + tile * folded_cols(cols) + (token - tile) * kFoldedTileCols,
          count * kFoldedTileCols};
}

/// Scratch bytes of a thread: one panel as int8 with float scales and mins.
constexpr int64_t gemm_quantized_scratch(int64_t cols) {
  return group_count(cols) * kPanelRows * (kGroupSize + 2 * 4);
}
/// Pairs of half panels that a thread keeps in L2 while the tokens pass, unpacked if they have 4
/// bits; a single tile of tokens takes them one by one.
constexpr int64_t kFoldedPairs = 32;
constexpr int64_t kFoldedResidentBytes = 1 << 20;
constexpr int64_t folded_residents(int64_t cols, int64_t tokens) {
  const int64_t fitting = kFoldedResidentBytes / (kPanelRows * folded_cols(cols) + 1);
  return tokens <= 2 * kTokenTile || fitting < 1 ? 1
         : fitting < kFoldedPairs                ? fitting
                                                 : kFoldedPairs;
}
/// The level avx2 takes two bytes for an int8 weight.
constexpr int64_t folded_pair_bytes(int64_t cols) { return 2 * kPanelRows * folded_cols(cols); }
/// Sums, totals and the list of pairs.
constexpr int64_t kFoldedStagingBytes = 8192 + kFoldedPairs * (192 + 4096);
constexpr int64_t gemm_folded_scratch(int64_t cols, int64_t tokens) {
  return kFoldedStagingBytes + folded_residents(cols, tokens) * folded_pair_bytes(cols);
}
/// The same and the results of a unit of work: tokens whose results are held, floats between two
/// halves of a panel, bytes in all.
constexpr int64_t gated_held_tokens(int64_t cols, int64_t chunk_tokens, int64_t block_cols) {
  const bool one_pass = folded_residents(cols, chunk_tokens) >= block_cols / kHalfPanelRows;
  return one_pass && chunk_tokens > 32 ? 32 : chunk_tokens;
}
constexpr int64_t gated_half_stride(int64_t held_tokens) {
  return (held_tokens + 1) * kHalfPanelRows;
}
constexpr int64_t gated_gemm_folded_scratch(int64_t cols, int64_t chunk_tokens,
                                            int64_t block_cols) {
  return gemm_folded_scratch(cols, chunk_tokens) +
         block_cols / kHalfPanelRows *
             gated_half_stride(gated_held_tokens(cols, chunk_tokens, block_cols)) * 4;
}

struct CpuKernels {
  void (*rms_norm)(const RmsNormArgs&, int64_t begin, int64_t end);  // rows
  void (*rope)(const RopeArgs&, int64_t begin, int64_t end);         // tokens
  void (*swiglu)(const SwigluArgs&, int64_t begin, int64_t end);  // blocks of kSwigluBlock columns
  void (*rms_norm_bwd)(const RmsNormBwdArgs&, int64_t begin, int64_t end);  // blocks of kNormBlock
  /// Adds up dweight; blocks of kReduceBlock columns.
  void (*rms_norm_bwd_weight)(const RmsNormBwdArgs&, int64_t begin, int64_t end);
  void (*swiglu_bwd)(const SwigluBwdArgs&, int64_t begin, int64_t end);      // blocks, as swiglu
  void (*softmax_xent)(const SoftmaxXentArgs&, int64_t begin, int64_t end);  // rows
  /// Blocks of kSquaredNormBlock elements.
  void (*squared_norm)(const SquaredNormArgs&, int64_t begin, int64_t end);
  void (*adamw)(const AdamwArgs&, int64_t begin, int64_t end);    // blocks of kAdamwBlock
  void (*gather)(const GatherArgs&, int64_t begin, int64_t end);  // tokens

  /// Blocks of kReduceBlock elements.
  void (*block_max)(const BlockReduceArgs&, int64_t begin, int64_t end);
  void (*block_exp_sum)(const BlockReduceArgs&, int64_t begin, int64_t end);

  void (*probe)(const ProbeArgs&, int64_t begin, int64_t end);  // blocks or tasks

  /// Blocks of kPanelRows weight rows.
  void (*gemm_f32)(const GemmFloatArgs&, int64_t begin, int64_t end);
  void (*gemm_bf16)(const GemmFloatArgs&, int64_t begin, int64_t end);
  GemmWorkspace (*gemm_bf16_workspace)(int64_t tokens, int64_t cols);
  /// Tiles of kTokenTile tokens; null at the levels whose workspace has no packed x.
  void (*gemm_bf16_pack_x)(const GemmFloatArgs&, int64_t begin, int64_t end);

  void (*kv_append)(const KvAppendArgs&, int64_t begin, int64_t end);  // items x kv heads
  void (*attention)(const AttentionArgs&, int64_t begin, int64_t end, void* scratch);  // items
  void (*attention_merge)(const AttentionArgs&, int64_t begin, int64_t end);           // items
  void (*packed_attention)(const PackedAttentionArgs&, int64_t begin, int64_t end,
                           void* scratch);  // items
  void (*packed_attention_bwd)(const PackedAttentionArgs&, int64_t begin, int64_t end,
                               void* scratch);  // items
  /// Adds up dk and dv; tokens.
  void (*packed_attention_bwd_sum)(const PackedAttentionArgs&, int64_t begin, int64_t end);
  // Null where the level has no such kernel: torch's products are as fast there.
  void (*matmul_pack)(const MatmulArgs&, int64_t begin, int64_t end);            // 32 rows of A
  void (*matmul)(const MatmulArgs&, int64_t begin, int64_t end, void* scratch);  // columns
  void (*quantize_activations)(const QuantizeActivationsArgs&, int64_t begin,
                               int64_t end);                                        // tokens
  void (*gemm_int8_grouped)(const GemmQuantizedArgs&, int64_t begin, int64_t end);  // panels
  void (*gemm_int4)(const GemmQuantizedArgs&, int64_t begin,
                    int64_t end);  // panels, both 4-bit formats

  void (*fold_activations)(const FoldActivationsArgs&, int64_t begin, int64_t end);  // tokens
  void (*gemm_int8)(const GemmFoldedArgs&, int64_t begin, int64_t end);              // panels
  // Null where the level has no such kernel.
  void (*gemm_folded)(const GemmFoldedArgs&, int64_t begin, int64_t end);  // chunks x panels
  void (*gated_gemm_folded)(const GatedGemmFoldedArgs&, int64_t begin,
                            int64_t end);  // chunks x blocks

  void (*decode_source)(const DecodeSourceArgs&, int64_t begin, int64_t end);  // rows
  void (*repack)(const RepackArgs&, int64_t begin, int64_t end);               // panels
  void (*quantize)(const QuantizeArgs&, int64_t begin, int64_t end);           // panels
};

}  // namespace qn::cpu

#ifdef QN_ISA
namespace qn::cpu::QN_ISA {

/// Sets the entries that this level implements; the others keep what the level below put there.
void fill(CpuKernels& table);

void rms_norm(const RmsNormArgs& args, int64_t begin, int64_t end);
void rope(const RopeArgs& args, int64_t begin, int64_t end);
void swiglu(const SwigluArgs& args, int64_t begin, int64_t end);
void rms_norm_bwd(const RmsNormBwdArgs& args, int64_t begin, int64_t end);
void rms_norm_bwd_weight(const RmsNormBwdArgs& args, int64_t begin, int64_t end);
void swiglu_bwd(const SwigluBwdArgs& args, int64_t begin, int64_t end);
void softmax_xent(const SoftmaxXentArgs& args, int64_t begin, int64_t end);
void squared_norm(const SquaredNormArgs& args, int64_t begin, int64_t end);
void adamw(const AdamwArgs& args, int64_t begin, int64_t end);
void gather(const GatherArgs& args, int64_t begin, int64_t end);
void block_max(const BlockReduceArgs& args, int64_t begin, int64_t end);
void block_exp_sum(const BlockReduceArgs& args, int64_t begin, int64_t end);
void probe(const ProbeArgs& args, int64_t begin, int64_t end);
void decode_source(const DecodeSourceArgs& args, int64_t begin, int64_t end);
void repack(const RepackArgs& args, int64_t begin, int64_t end);
void quantize(const QuantizeArgs& args, int64_t begin, int64_t end);

void gemm_f32(const GemmFloatArgs& args, int64_t begin, int64_t end);
void gemm_bf16(const GemmFloatArgs& args, int64_t begin, int64_t end);
GemmWorkspace gemm_bf16_workspace(int64_t tokens, int64_t cols);
void gemm_bf16_pack_x(const GemmFloatArgs& args, int64_t begin, int64_t end);

void kv_append(const KvAppendArgs& args, int64_t begin, int64_t end);
void attention(const AttentionArgs& args, int64_t begin, int64_t end, void* scratch);
void attention_merge(const AttentionArgs& args, int64_t begin, int64_t end);
void packed_attention(const PackedAttentionArgs& args, int64_t begin, int64_t end, void* scratch);
void packed_attention_bwd(const PackedAttentionArgs& args, int64_t begin, int64_t end,
                          void* scratch);
void packed_attention_bwd_sum(const PackedAttentionArgs& args, int64_t begin, int64_t end);
void matmul_pack(const MatmulArgs& args, int64_t begin, int64_t end);
void matmul(const MatmulArgs& args, int64_t begin, int64_t end, void* scratch);
void quantize_activations(const QuantizeActivationsArgs& args, int64_t begin, int64_t end);
void gemm_int8_grouped(const GemmQuantizedArgs& args, int64_t begin, int64_t end);
void gemm_int4(const GemmQuantizedArgs& args, int64_t begin, int64_t end);
void fold_activations(const FoldActivationsArgs& args, int64_t begin, int64_t end);
void gemm_int8(const GemmFoldedArgs& args, int64_t begin, int64_t end);
void gemm_folded(const GemmFoldedArgs& args, int64_t begin, int64_t end);
void gated_gemm_folded(const GatedGemmFoldedArgs& args, int64_t begin, int64_t end);

}  // namespace qn::cpu::QN_ISA
#endif
