// RoPE, half-split pairs, in place:
// (a, b) = (x[i], x[i + half]) becomes (a cos - b sin, b cos + a sin).
//
//   x [tokens, heads, head_dim] f32 or bf16; elements from 2 * half on are untouched
//   cos, sin [tokens, half] f32
//   arithmetic: float32, one rounding at the store
//   levels: all (Vec)
//   bytes per token: 4 * heads * half * sizeof(T)
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

template <typename T>
void rope_tokens(const RopeArgs& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const float* cos = a.cos + token * a.cos_stride;
    const float* sin = a.sin + token * a.sin_stride;
    for (int64_t head = 0; head < a.heads; ++head) {
      T* low = static_cast<T*>(a.x) + token * a.token_stride + head * a.head_stride;
      T* high = low + a.half;
      for (int64_t i = 0; i < a.half; i += Vec::kLanes) {
        const int64_t left = a.half - i;
        const int n = left < Vec::kLanes ? static_cast<int>(left) : Vec::kLanes;
        const Vec c = Vec::load(cos + i, n), s = Vec::load(sin + i, n);
        const Vec x = Vec::load(low + i, n), y = Vec::load(high + i, n);
        fma(x, c, Vec::zero() - y * s).store(low + i, n);
        fma(y, c, x * s).store(high + i, n);
      }
    }
  }
}

}  // namespace

void rope(const RopeArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::F32:
      return rope_tokens<float>(args, begin, end);
    case DType::BF16:
      return rope_tokens<bf16>(args, begin, end);
    default:
      __builtin_trap();
  }
}

}  // namespace qn::cpu::QN_ISA
