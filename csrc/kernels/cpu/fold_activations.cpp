// Activations to int8 with one scale per token and block of columns, the right-hand operand of the
// GEMMs whose weights have one scale per row (vec_fold.h has the formula).
//
//   x [tokens, cols] f32 -> FoldedActivations; columns past cols are zeros
//   levels: all (Vec); bytes per row: 4 * cols read, twice, but from the cache; cols written
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec_fold.h"

namespace qn::cpu::QN_ISA {

void fold_activations(const FoldActivationsArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = a.out.blocks(a.cols);
  for (int64_t token = begin; token < end; ++token) {
    FoldedRow row = folded_row(a.out, a.cols, token);
    int16_t* const group_sums = a.out.group_sums + token * folded_cols(a.cols) / kGroupSize;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t column = block * a.out.block_cols;
      const auto within = [&](int64_t cols) {
        return cols - column < a.out.block_cols ? cols - column : a.out.block_cols;
      };
      const FoldedBlock folded =
          fold_block(a.x + token * a.x_stride + column, Vec::kLanes, within(a.cols),
                     within(folded_cols(a.cols)), row, group_sums + column / kGroupSize);
      const int64_t at = token * blocks + block;
      a.out.scale[at] = folded.scale;
      a.out.negative_sum[at] = folded.negative_sum;
      row.codes += a.out.block_cols / kFoldedTileCols * row.step;
    }
  }
}

}  // namespace qn::cpu::QN_ISA
