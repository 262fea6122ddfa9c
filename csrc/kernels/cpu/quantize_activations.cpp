// Activations to int8 in groups of 32 columns, the right-hand operand of the exact GEMMs.
//
//   scale = max |x| / 127 of the group, code = round(x * (127 / max |x|)), ties to even
//
//   x [tokens, cols] f32 -> QuantizedActivations; columns past cols are zeros
//   A group with a NaN or an infinity gets the scale NaN, so that every result of its row is NaN.
//   levels: all (Vec); bytes per row: 4 * cols read, cols + 12 * cols / 32 written
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"
#include "kernels/cpu/vec_dot.h"

namespace qn::cpu::QN_ISA {
namespace {

QN_INLINE int lanes(int64_t left) {
  return left <= 0 ? 0 : left < Vec::kLanes ? static_cast<int>(left) : Vec::kLanes;
}

}  // namespace

void quantize_activations(const QuantizeActivationsArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = group_count(a.cols);
  for (int64_t token = begin; token < end; ++token) {
    const float* x = a.x + token * a.x_stride;
    const ActivationSlot slot = activation_slot(token, a.out.tokens, groups);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t column = g * kGroupSize;
      const Vec first = Vec::load(x + column, lanes(a.cols - column));
      const int rest = lanes(a.cols - column - Vec::kLanes);
      const Vec second = rest > 0 ? Vec::load(x + column + Vec::kLanes, rest) : Vec::zero();
      LargestMagnitude largest;
      largest.add(first);
      largest.add(second);
      const ActivationScale scale = activation_scale(largest.bits());
      const int64_t at = slot.first + g * slot.stride;
      int8_t* codes = a.out.codes + at * kGroupSize;
      const Vec factor(scale.inverse);
      int32_t sum = 0;
      if (scale.finite) {
        const Vec rounded = store_rounded(first * factor, codes);
        sum = static_cast<int32_t>(
            qn::cpu::QN_ISA::sum(rounded + store_rounded(second * factor, codes + Vec::kLanes)));
      } else {
        memset(codes, 0, kGroupSize);
      }
      a.out.scale[at] = scale.scale;
      a.out.negative_sum[at] = -sum;
      a.out.scaled_sum[at] = scale.scale * static_cast<float>(sum);
    }
  }
}

}  // namespace qn::cpu::QN_ISA
