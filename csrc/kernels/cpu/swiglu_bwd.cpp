// Gradients of SwiGLU, with s = 1 / (1 + exp(-gate)):
// dup = dout * gate * s, dgate = dout * up * s * (1 + gate * (1 - s)).
//
//   all [tokens, inter] f32 or bf16; dgate and dup may be dout, gate or up
//   unit of work: kSwigluBlock columns of one row
//   arithmetic: float32, one rounding at the store
//   levels: all (Vec)
//   bytes per row: 5 * inter * sizeof(T)
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

template <typename T>
void bwd_blocks(const SwigluBwdArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks_per_row = (a.inter + kSwigluBlock - 1) / kSwigluBlock;
  const Vec one(1.0f);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block / blocks_per_row;
    const int64_t first = block % blocks_per_row * kSwigluBlock;
    const int64_t last = first + kSwigluBlock < a.inter ? first + kSwigluBlock : a.inter;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    const T* dout = static_cast<const T*>(a.dout) + row * a.dout_stride;
    T* dgate = static_cast<T*>(a.dgate) + row * a.dgate_stride;
    T* dup = static_cast<T*>(a.dup) + row * a.dup_stride;
    for (int64_t i = first; i < last; i += Vec::kLanes) {
      const int64_t left = last - i;
      const int n = left < Vec::kLanes ? static_cast<int>(left) : Vec::kLanes;
      const Vec g = Vec::load(gate + i, n), u = Vec::load(up + i, n), d = Vec::load(dout + i, n);
      const Vec sigmoid = one / (one + exp(Vec::zero() - g));
      (d * u * sigmoid * fma(g, one - sigmoid, one)).store(dgate + i, n);
      (d * (g * sigmoid)).store(dup + i, n);
    }
  }
}

}  // namespace

void swiglu_bwd(const SwigluBwdArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::F32:
      return bwd_blocks<float>(args, begin, end);
    case DType::BF16:
      return bwd_blocks<bf16>(args, begin, end);
    default:
      __builtin_trap();
  }
}

}  // namespace qn::cpu::QN_ISA
