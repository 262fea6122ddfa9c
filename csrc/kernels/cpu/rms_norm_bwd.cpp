// Gradients of RMSNorm, with n = 1 / sqrt(mean(x^2) + eps) and g = dy * weight:
//
//   dx = n * (g - x * n^2 * mean(g * x)) + residual_grad,  dweight = sum over the rows of dy * x *
//   n
//
//   dx, dy, x, residual_grad [rows, cols] f32 or bf16; weight, dweight [cols] f32 or bf16
//   accumulation: float32; sums along a row as in rms_norm.cpp; dweight in blocks of kNormBlock
//   rows, one after the other, then the blocks pairwise levels: all (Vec); x and dy are read twice,
//   the second time from L1 bytes per row: 3 * cols * sizeof(T), with a residual_grad 4 * cols *
//   sizeof(T)
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int kUnroll = 4;

QN_INLINE int lanes_left(int64_t i, int64_t end) {
  return end - i < Vec::kLanes ? static_cast<int>(end - i) : Vec::kLanes;
}

/// Sums of x^2 and of dy * weight * x.
template <typename T, typename W>
QN_INLINE void row_sums(const T* x, const T* dy, const W* weight, int64_t cols, float& squares,
                        float& products) {
  Vec square[kUnroll], product[kUnroll];
  for (int u = 0; u < kUnroll; ++u) square[u] = product[u] = Vec::zero();
  const auto add = [&](int64_t i, int n, int u) {
    const Vec v = Vec::load(x + i, n);
    square[u] = fma(v, v, square[u]);
    product[u] = fma(Vec::load(dy + i, n) * Vec::load(weight + i, n), v, product[u]);
  };
  int64_t i = 0;
  for (; i + kUnroll * Vec::kLanes <= cols; i += kUnroll * Vec::kLanes) {
    for (int u = 0; u < kUnroll; ++u) add(i + u * Vec::kLanes, Vec::kLanes, u);
  }
  for (int u = 0; i < cols; i += Vec::kLanes, ++u) add(i, lanes_left(i, cols), u);
  squares = sum((square[0] + square[1]) + (square[2] + square[3]));
  products = sum((product[0] + product[1]) + (product[2] + product[3]));
}

template <typename T, typename W>
void bwd_blocks(const RmsNormBwdArgs& a, int64_t begin, int64_t end) {
  const W* weight = static_cast<const W*>(a.weight);
  const double cols = static_cast<double>(a.cols);
  for (int64_t block = begin; block < end; ++block) {
    float* dweight = a.partial + block * a.cols;
    memset(dweight, 0, static_cast<size_t>(a.cols) * sizeof(float));
    const int64_t last = (block + 1) * kNormBlock < a.rows ? (block + 1) * kNormBlock : a.rows;
    for (int64_t row = block * kNormBlock; row < last; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
      const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
      const T* residual = a.residual_grad != nullptr
                              ? static_cast<const T*>(a.residual_grad) + row * a.residual_stride
                              : nullptr;
      T* dx = static_cast<T*>(a.dx) + row * a.dx_stride;
      float squares, products;
      row_sums(x, dy, weight, a.cols, squares, products);
      // One rounding each: these errors would be those of the whole row.
      const double norm = 1 / ::sqrt(squares / cols + a.eps);
      const Vec scale(static_cast<float>(norm));
      const Vec slope(static_cast<float>(-norm * norm * norm * (products / cols)));
      for (int64_t i = 0; i < a.cols; i += Vec::kLanes) {
        const int n = lanes_left(i, a.cols);
        const Vec v = Vec::load(x + i, n), g = Vec::load(dy + i, n);
        fma(g, v * scale, Vec::load(dweight + i, n)).store(dweight + i, n);
        Vec result = fma(g * Vec::load(weight + i, n), scale, v * slope);
        if (residual != nullptr) result = result + Vec::load(residual + i, n);
        result.store(dx + i, n);
      }
    }
  }
}

template <typename W>
void sum_blocks(const RmsNormBwdArgs& a, int64_t begin, int64_t end) {
  const int64_t first = begin * kReduceBlock;
  const int64_t last = end * kReduceBlock < a.cols ? end * kReduceBlock : a.cols;
  for (int64_t blocks = (a.rows + kNormBlock - 1) / kNormBlock; blocks > 1;) {
    const int64_t half = (blocks + 1) / 2;
    for (int64_t block = half; block < blocks; ++block) {
      float* into = a.partial + (block - half) * a.cols;
      for (int64_t i = first; i < last; i += Vec::kLanes) {
        const int n = lanes_left(i, last);
        (Vec::load(into + i, n) + Vec::load(a.partial + block * a.cols + i, n)).store(into + i, n);
      }
    }
    blocks = half;
  }
  for (int64_t i = first; i < last; i += Vec::kLanes) {
    const int n = lanes_left(i, last);
    const Vec total = a.rows > 0 ? Vec::load(a.partial + i, n) : Vec::zero();
    total.store(static_cast<W*>(a.dweight) + i, n);
  }
}

}  // namespace

void rms_norm_bwd(const RmsNormBwdArgs& args, int64_t begin, int64_t end) {
  const bool narrow_weight = args.weight_dtype == DType::BF16;
  switch (args.dtype) {
    case DType::F32:
      return narrow_weight ? bwd_blocks<float, bf16>(args, begin, end)
                           : bwd_blocks<float, float>(args, begin, end);
    case DType::BF16:
      return narrow_weight ? bwd_blocks<bf16, bf16>(args, begin, end)
                           : bwd_blocks<bf16, float>(args, begin, end);
    default:
      __builtin_trap();
  }
}

void rms_norm_bwd_weight(const RmsNormBwdArgs& args, int64_t begin, int64_t end) {
  switch (args.weight_dtype) {
    case DType::F32:
      return sum_blocks<float>(args, begin, end);
    case DType::BF16:
      return sum_blocks<bf16>(args, begin, end);
    default:
      __builtin_trap();
  }
}

}  // namespace qn::cpu::QN_ISA
