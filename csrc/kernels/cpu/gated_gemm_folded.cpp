// The first half of an MLP on AMX tiles: out = silu(x gate^T) * (x up^T), folded for the GEMM that
// follows (amx_folded_gemm.h). With Int8 weights the bits are those of gemm_int8, swiglu and
// fold_activations.
//
//   unit of work: a chunk of tokens x a block of out's columns, so that the block's results stay in
//   L2 until their scales are known; float32 [tokens, 2 * rows] never goes through memory
//   tiles: sixteen rows of gate beside the same sixteen rows of up
//   level: amx only
#include "kernels/cpu/kernels.h"
#if QN_ISA_LEVEL >= 3
#include "kernels/cpu/amx_folded_gemm.h"
#include "kernels/cpu/vec_fold.h"

namespace qn::cpu::QN_ISA {
namespace {

/// silu(gate) * up of one unit, [half][token][16]. Halves lie a line apart from a power of two, so
/// that those of a token do not compete for one cache set.
class GatedSink {
 public:
  GatedSink(float* out, int64_t chunk_tokens, int64_t first_token, int64_t first_half)
      : out_(out - first_token * kHalfPanelRows),
        stride_(gated_half_stride(chunk_tokens)),
        first_half_(first_half) {}

  QN_INLINE void start(int64_t half, const __m512* scale) {
    half_ = out_ + (half - first_half_) * stride_;
    for (int s = 0; s < 2; ++s) scale_[s] = scale[s];
  }
  QN_INLINE void row(int64_t token, const __m512* y) {
    const Vec gate = Vec(y[0]) * Vec(scale_[0]), up = Vec(y[1]) * Vec(scale_[1]);
    (silu(gate) * up).store(half_ + token * kHalfPanelRows);
  }

 private:
  float* out_;
  int64_t stride_, first_half_;
  float* half_ = nullptr;
  __m512 scale_[2];
};

}  // namespace

void gated_gemm_folded(const GatedGemmFoldedArgs& a, int64_t begin, int64_t end) {
  const TileScope tiles;
  FoldedStaging* staging = static_cast<FoldedStaging*>(a.scratch);
  float* block_out = reinterpret_cast<float*>(reinterpret_cast<char*>(staging + 1) +
                                              kPanelRows * folded_cols(a.cols));
  const int64_t block_cols = a.out.block_cols, blocks = a.out.blocks(a.rows);
  const auto half_at = [&](const GatedWeight& weight, int64_t half) {
    return HalfPanel{
        static_cast<const uint8_t*>(weight.data) + half / 2 * panel_bytes(weight.format, a.cols),
        static_cast<int>(half % 2), weight.format};
  };
  const auto pair_at = [&](int64_t half) {
    return PanelPair{{half_at(a.gate, half), half_at(a.up, half)}};
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit / blocks * a.chunk_tokens, block = unit % blocks;
    const int64_t last = first + a.chunk_tokens < a.x.tokens ? first + a.chunk_tokens : a.x.tokens;
    const int64_t column = block * block_cols;
    const int64_t valid = a.rows - column < block_cols ? a.rows - column : block_cols;
    const int64_t half = column / kHalfPanelRows;
    GatedSink sink(block_out, a.chunk_tokens, first, half);
    multiply_pairs(a.x, a.cols, first, last, half,
                   half + (valid + kHalfPanelRows - 1) / kHalfPanelRows, staging, pair_at, sink);
    const int64_t padded = (valid + kFoldedTileCols - 1) / kFoldedTileCols * kFoldedTileCols;
    for (int64_t token = first; token < last; ++token) {
      FoldedRow row = folded_row(a.out, a.rows, token);
      row.codes += column / kFoldedTileCols * row.step;
      a.out.scale[token * blocks + block] =
          fold_block(block_out + (token - first) * kHalfPanelRows,
                     gated_half_stride(a.chunk_tokens), valid, padded, row)
              .scale;
    }
  }
}

}  // namespace qn::cpu::QN_ISA
#endif
