// RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight, optionally after residual += x.
//
//   x, out, residual [rows, cols] f32 or bf16; weight [cols] f32 or bf16
//   accumulation: float32 in four Vecs of sixteen lanes, reduced pairwise; one rounding at the end
//   levels: all (Vec); with a residual the row is read twice, the second time from L1
//   bytes per row: 2 * cols * sizeof(T), with a residual 4 * cols * sizeof(T)
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int kUnroll = 4;

/// Adds x to residual in place and returns the sum of squares; without a residual only the latter.
template <typename T>
QN_INLINE float sum_of_squares(const T* x, T* residual, int64_t cols) {
  Vec acc[kUnroll] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  const T* source = residual != nullptr ? residual : x;
  const auto add = [&](int64_t i, int n, Vec& total) {
    if (residual != nullptr)
      (Vec::load(residual + i, n) + Vec::load(x + i, n)).store(residual + i, n);
    const Vec v = Vec::load(source + i, n);
    total = fma(v, v, total);
  };
  int64_t i = 0;
  for (; i + kUnroll * Vec::kLanes <= cols; i += kUnroll * Vec::kLanes) {
    for (int u = 0; u < kUnroll; ++u) add(i + u * Vec::kLanes, Vec::kLanes, acc[u]);
  }
  for (int u = 0; i < cols; i += Vec::kLanes, ++u) {
    const int64_t left = cols - i;
    add(i, left < Vec::kLanes ? static_cast<int>(left) : Vec::kLanes, acc[u]);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <typename T, typename W>
void rms_norm_rows(const RmsNormArgs& a, int64_t begin, int64_t end) {
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* residual =
        a.residual != nullptr ? static_cast<T*>(a.residual) + row * a.residual_stride : nullptr;
    T* out = static_cast<T*>(a.out) + row * a.out_stride;
    const float mean = sum_of_squares(x, residual, a.cols) / static_cast<float>(a.cols);
    const Vec scale(1.0f / sqrtf(mean + a.eps));
    const T* source = residual != nullptr ? residual : x;
    for (int64_t i = 0; i < a.cols; i += Vec::kLanes) {
      const int64_t left = a.cols - i;
      const int n = left < Vec::kLanes ? static_cast<int>(left) : Vec::kLanes;
      (Vec::load(source + i, n) * scale * Vec::load(weight + i, n)).store(out + i, n);
    }
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const bool narrow_weight = args.weight_dtype == DType::BF16;
  switch (args.dtype) {
    case DType::F32:
      return narrow_weight ? rms_norm_rows<float, bf16>(args, begin, end)
                           : rms_norm_rows<float, float>(args, begin, end);
    case DType::BF16:
      return narrow_weight ? rms_norm_rows<bf16, bf16>(args, begin, end)
                           : rms_norm_rows<bf16, float>(args, begin, end);
    default:
      __builtin_trap();
  }
}

}  // namespace qn::cpu::QN_ISA
