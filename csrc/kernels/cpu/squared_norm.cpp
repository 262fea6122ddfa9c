// Sums of squares, block by block: partial[block] = sum of x^2 over the block's elements.
//
//   x [n] f32 or bf16; partial [blocks] f64
//   unit of work: kSquaredNormBlock elements
//   arithmetic: float32 in four Vecs, which are added pairwise; NaN and inf reach the result
//   levels: all (Vec)
//   bytes per element: sizeof(T)
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

template <typename T>
void sum_blocks(const SquaredNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kSquaredNormBlock;
    const int64_t left = a.n - first;
    const int64_t n = left < kSquaredNormBlock ? left : kSquaredNormBlock;
    const T* x = static_cast<const T*>(a.x) + first;
    Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    int64_t i = 0;
    for (; i + 4 * Vec::kLanes <= n; i += 4 * Vec::kLanes) {
      for (int k = 0; k < 4; ++k) {
        const Vec v = Vec::load(x + i + k * Vec::kLanes);
        sums[k] = fma(v, v, sums[k]);
      }
    }
    for (; i < n; i += Vec::kLanes) {
      const int lanes = n - i < Vec::kLanes ? static_cast<int>(n - i) : Vec::kLanes;
      const Vec v = Vec::load(x + i, lanes);
      sums[0] = fma(v, v, sums[0]);
    }
    a.partial[block] = static_cast<double>(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
}

}  // namespace

void squared_norm(const SquaredNormArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::F32:
      return sum_blocks<float>(args, begin, end);
    case DType::BF16:
      return sum_blocks<bf16>(args, begin, end);
    default:
      __builtin_trap();
  }
}

}  // namespace qn::cpu::QN_ISA
