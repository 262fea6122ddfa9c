// One token's block of columns as int8 with one scale (FoldedActivations), at every level.
//
//   scale = max |x| / 127 of the block, code = round(x * (127 / max |x|)), ties to even
//
// A block with a NaN or an infinity gets the scale NaN and codes of zero.
#pragma once
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec_dot.h"

namespace qn::cpu::QN_ISA {

struct FoldedBlock {
  float scale;
  int32_t negative_sum;  // -(sum of the codes)
};

/// The columns [0, valid), and zeros up to `padded` (whole tiles). Sixteen columns of x lie
/// together, x_stride floats apart; the codes go to out.codes, the next 64 to out.codes + out.step,
/// and, at the level avx2, their sums to group_sums.
QN_INLINE FoldedBlock fold_block(const float* x, int64_t x_stride, int64_t valid, int64_t padded,
                                 FoldedRow out, [[maybe_unused]] int16_t* group_sums) {
  const auto load = [&](int64_t c) {
    const float* sixteen = x + c / Vec::kLanes * x_stride;
    const int64_t left = valid - c;
    return left >= Vec::kLanes ? Vec::load(sixteen)
           : left > 0          ? Vec::load(sixteen, static_cast<int>(left))
                               : Vec::zero();
  };
  LargestMagnitude largest;
  for (int64_t c = 0; c < valid; c += Vec::kLanes) largest.add(load(c));
  const ActivationScale scale = activation_scale(largest.bits());
  const auto codes = [&](int64_t c) {
    return out.codes + c / kFoldedTileCols * out.step + c % kFoldedTileCols;
  };
  if (!scale.finite) {
    for (int64_t c = 0; c < padded; c += kFoldedTileCols) memset(codes(c), 0, kFoldedTileCols);
    if (QN_ISA_LEVEL == 1) memset(group_sums, 0, padded / kGroupSize * sizeof *group_sums);
    return {scale.scale, 0};
  }
  const Vec inverse(scale.inverse);
  CodeStore store;
  for (int64_t c = 0; c < padded; c += kFoldedTileCols) {
    Vec scaled[4];
    for (int i = 0; i < 4; ++i) scaled[i] = load(c + i * Vec::kLanes) * inverse;
    store.store(scaled, codes(c));
#if QN_ISA_LEVEL == 1
    for (int i = 0; i < 2; ++i, ++group_sums) {
      *group_sums = sum_of_codes(codes(c) + i * kGroupSize);
    }
#endif
  }
  return {scale.scale, -store.sum()};
}

}  // namespace qn::cpu::QN_ISA
