// The first half of an MLP: out = silu(x gate^T) * (x up^T), folded for the GEMM that
// follows (folded_gemm.h). With Int8 weights the bits are those of gemm_int8, swiglu and
// fold_activations.
//
//   unit of work: a chunk of tokens x a block of out's columns, so that the block's results stay in
//   L2 until their scales are known; float32 [tokens, 2 * rows] never goes through memory
//   tiles: sixteen rows of gate beside the same sixteen rows of up
//   levels: avx2, avx512, amx
#include "kernels/cpu/kernels.h"
#if QN_ISA_LEVEL >= 1
#if QN_ISA_LEVEL >= 4
#include "kernels/cpu/amx_folded_gemm.h"
#else
#include "kernels/cpu/vec_folded_gemm.h"
#endif
#include "kernels/cpu/vec_fold.h"

namespace qn::cpu::QN_ISA {
namespace {

/// silu(gate) * up of one block of columns: held as [half][token][16] until all halves are there,
/// then folded. Halves lie a line apart from a power of two, so that those of a token do not
/// compete for one cache set.
class GatedSink {
 public:
  GatedSink(const GatedGemmFoldedArgs& args, float* held, int64_t first_token, int64_t block)
      : a_(args),
        held_(held),
        held_tokens_(gated_held_tokens(args.cols, args.chunk_tokens, args.out.block_cols)),
        stride_(gated_half_stride(held_tokens_)),
        block_(block),
        first_token_(first_token) {
    const int64_t column = block * args.out.block_cols;
    const int64_t left = args.rows - column;
    valid_ = left < args.out.block_cols ? left : args.out.block_cols;
    first_half_ = column / kHalfPanelRows;
    end_half_ = first_half_ + (valid_ + kHalfPanelRows - 1) / kHalfPanelRows;
  }
  int64_t first_half() const { return first_half_; }
  int64_t end_half() const { return end_half_; }

  QN_INLINE void start_pairs(int64_t end) { complete_ = end == end_half_; }
  QN_INLINE void prepare(int64_t, int64_t, int64_t) {}
  QN_INLINE void start_tokens(int64_t token) {
    tokens_ = held_ - (held_tokens_ <= 32 ? token : first_token_) * kHalfPanelRows;
  }
  QN_INLINE void start(int64_t half, const Vec* scale) {
    half_ = tokens_ + (half - first_half_) * stride_;
    for (int s = 0; s < 2; ++s) scale_[s] = scale[s];
  }
  QN_INLINE void row(int64_t token, const Vec* y) {
    const Vec gate = y[0] * scale_[0], up = y[1] * scale_[1];
    (silu(gate) * up).store(half_ + token * kHalfPanelRows);
  }
  void finish_tokens(int64_t begin, int64_t end) {
    if (!complete_) return;
    const int64_t column = block_ * a_.out.block_cols;
    const int64_t padded = (valid_ + kFoldedTileCols - 1) / kFoldedTileCols * kFoldedTileCols;
    for (int64_t token = begin; token < end; ++token) {
      FoldedRow row = folded_row(a_.out, a_.rows, token);
      row.codes += column / kFoldedTileCols * row.step;
      int16_t* const group_sums =
          a_.out.group_sums + (token * folded_cols(a_.rows) + column) / kGroupSize;
      const FoldedBlock folded =
          fold_block(tokens_ + token * kHalfPanelRows, stride_, valid_, padded, row, group_sums);
      const int64_t at = token * a_.out.blocks(a_.rows) + block_;
      a_.out.scale[at] = folded.scale;
      a_.out.negative_sum[at] = folded.negative_sum;
    }
  }

 private:
  const GatedGemmFoldedArgs& a_;
  float* held_;
  int64_t held_tokens_, stride_, block_, first_token_, valid_, first_half_, end_half_;
  bool complete_ = false;
  float *tokens_ = nullptr, *half_ = nullptr;
  Vec scale_[2];
};

}  // namespace

void gated_gemm_folded(const GatedGemmFoldedArgs& a, int64_t begin, int64_t end) {
  [[maybe_unused]] const FoldedScope scope;
  FoldedStaging* staging = static_cast<FoldedStaging*>(a.scratch);
  float* held = reinterpret_cast<float*>(static_cast<char*>(a.scratch) +
                                         gemm_folded_scratch(a.cols, a.chunk_tokens));
  const int64_t blocks = a.out.blocks(a.rows);
  const auto half_at = [&](const GatedWeight& weight, int64_t half) {
    return HalfPanel{
        static_cast<const uint8_t*>(weight.data) + half / 2 * panel_bytes(weight.format, a.cols),
        static_cast<int>(half % 2), weight.format};
  };
  const auto pair_at = [&](int64_t half) {
    return PanelPair{{half_at(a.gate, half), half_at(a.up, half)}};
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t cut = unit - a.whole_units;
    const int64_t whole = cut < 0 ? unit : a.whole_units + cut / a.pieces;
    int64_t first = whole / blocks * a.chunk_tokens;
    int64_t last = first + a.chunk_tokens < a.x.tokens ? first + a.chunk_tokens : a.x.tokens;
    if (cut >= 0) {
      const int64_t tiles_of_32 = (last - first + 31) / 32, piece = cut % a.pieces;
      const int64_t begin_tile = tiles_of_32 * piece / a.pieces;
      const int64_t end_tile = tiles_of_32 * (piece + 1) / a.pieces;
      last = piece + 1 == a.pieces ? last : first + 32 * end_tile;
      first += 32 * begin_tile;
    }
    if (first == last) continue;
    GatedSink sink(a, held, first, whole % blocks);
    multiply_pairs(a.x, a.cols, first, last, sink.first_half(), sink.end_half(), staging, pair_at,
                   sink);
  }
}

}  // namespace qn::cpu::QN_ISA
#endif
