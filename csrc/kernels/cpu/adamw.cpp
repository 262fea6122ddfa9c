// One step of AdamW, g = grad_scale * grad: mean and square move towards g and g^2, and
// master -= rate * (weight_decay * master + mean / c1 / (sqrt(square / c2) + eps)).
//
//   master, mean, square [n] f32; grad [n] f32 or bf16; parameter [n] bf16, the rounded master
//   unit of work: kAdamwBlock elements
//   arithmetic: float32
//   levels: all (Vec)
//   bytes per element: 24 + sizeof(grad), with a parameter 2 more
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

template <typename G>
void adamw_blocks(const AdamwArgs& a, int64_t begin, int64_t end) {
  const Vec scale(a.grad_scale), eps(a.eps), keep(a.keep), rate(-a.rate),
      correction2(a.correction2);
  const Vec beta1(a.beta1), beta2(a.beta2), rest1(a.rest1), rest2(a.rest2);
  const G* grad = static_cast<const G*>(a.grad);
  const int64_t last = end * kAdamwBlock < a.n ? end * kAdamwBlock : a.n;
  for (int64_t i = begin * kAdamwBlock; i < last; i += Vec::kLanes) {
    const int n = last - i < Vec::kLanes ? static_cast<int>(last - i) : Vec::kLanes;
    const Vec g = Vec::load(grad + i, n) * scale;
    const Vec mean = fma(Vec::load(a.mean + i, n), beta1, g * rest1);
    const Vec square = fma(Vec::load(a.square + i, n), beta2, g * g * rest2);
    mean.store(a.mean + i, n);
    square.store(a.square + i, n);
    const Vec move = mean / (sqrt(square * correction2) + eps);
    const Vec master = fma(move, rate, Vec::load(a.master + i, n) * keep);
    master.store(a.master + i, n);
    if (a.parameter != nullptr) master.store(a.parameter + i, n);
  }
}

}  // namespace

void adamw(const AdamwArgs& args, int64_t begin, int64_t end) {
  switch (args.grad_dtype) {
    case DType::F32:
      return adamw_blocks<float>(args, begin, end);
    case DType::BF16:
      return adamw_blocks<bf16>(args, begin, end);
    default:
      __builtin_trap();
  }
}

}  // namespace qn::cpu::QN_ISA
