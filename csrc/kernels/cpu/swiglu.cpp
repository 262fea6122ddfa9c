// SwiGLU: out = silu(gate) * up, silu(x) = x / (1 + exp(-x)).
//
//   out, gate, up [tokens, inter] f32 or bf16; out may be gate or up
//   unit of work: kSwigluBlock columns of one row
//   arithmetic: float32, one rounding at the store; -inf in gate gives NaN, as in torch
//   levels: all (Vec)
//   bytes per row: 3 * inter * sizeof(T)
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

template <typename T>
void swiglu_blocks(const SwigluArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks_per_row = (a.inter + kSwigluBlock - 1) / kSwigluBlock;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block / blocks_per_row;
    const int64_t first = block % blocks_per_row * kSwigluBlock;
    const int64_t last = first + kSwigluBlock < a.inter ? first + kSwigluBlock : a.inter;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
    T* out = static_cast<T*>(a.out) + row * a.out_stride;
    for (int64_t i = first; i < last; i += Vec::kLanes) {
      const int64_t left = last - i;
      const int n = left < Vec::kLanes ? static_cast<int>(left) : Vec::kLanes;
      (silu(Vec::load(gate + i, n)) * Vec::load(up + i, n)).store(out + i, n);
    }
  }
}

}  // namespace

void swiglu(const SwigluArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::F32:
      return swiglu_blocks<float>(args, begin, end);
    case DType::BF16:
      return swiglu_blocks<bf16>(args, begin, end);
    default:
      __builtin_trap();
  }
}

}  // namespace qn::cpu::QN_ISA
