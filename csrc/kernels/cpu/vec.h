// Vec: sixteen float lanes, whatever the level (one zmm, two ymm, or an array). Because the number
// of lanes never changes, a kernel written with Vec has the same reduction order at every level,
// and a panel of sixteen weight rows is one Vec everywhere.
//
//   Vec::load(p), load(p, n)   f32 or bf16 source; lanes n.. are zero
//   store(p), store(p, n)      the other way; bf16 rounds to nearest even
//   Vec::zero(), Vec(x)        broadcast
//   a + b, a - b, a * b, a / b
//   fma(a, b, c)               a * b + c
//   max(a, b), min(a, b)       NaN in b wins
//   sqrt(a)                    correctly rounded
//   abs(a), select_less(a, b, x, y)   lanes of x where a < b, else of y
//   load_half(p), store_half(p, a)    sixteen IEEE binary16 (as uint16_t), to nearest even
//   sum(a), max(a)             over the lanes
//   load_pairs(p, even, odd)   of 32 bf16 or int8; store_exact_pairs(p, even, odd) to bf16
//   any_above(a, b)            whether some lane of a is not <= b, NaN included
//   exp2(a)                    <= 3 ulp on [-126, 127.9], exact for whole numbers; below gives 0;
//                              NaN stays NaN
//   exp(a)                     <= 2 ulp on [-87.3, 88.7]; below gives 0, above inf; NaN stays NaN
//   silu(a)                    a / (1 + exp(-a)); -inf gives NaN, as in torch
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "core/dtype.h"
#include "kernels/scalar.h"

#define QN_INLINE inline __attribute__((always_inline))

#if QN_ISA_LEVEL >= 2
#include "kernels/cpu/vec_avx512.h"
#elif QN_ISA_LEVEL == 1
#include "kernels/cpu/vec_avx2.h"
#else
#include "kernels/cpu/vec_scalar.h"
#endif

namespace qn::cpu::QN_ISA {

QN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#if QN_ISA_LEVEL < 2
QN_INLINE Vec silu(Vec x) { return x / (Vec(1.0f) + exp(Vec::zero() - x)); }
#endif

}  // namespace qn::cpu::QN_ISA
