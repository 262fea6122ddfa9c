// Log-probability of one target per row, and the gradient of the logits in their place:
// log_prob = scale * x[target] - log(sum(exp(scale * x))),
// dx = grad * scale * (one_hot(target) - softmax(scale * x)).
//
//   logits [rows, vocab] f32 or bf16, in-out; a row without a target gives 0 and zeros
//   accumulation: float32 in blocks of kBlock elements, the blocks' sums in float64
//   levels: all (Vec); a row is read three times, from L2 after the first
//   bytes per row: vocab * sizeof(T), with a gradient twice that
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int kUnroll = 4;

/// What a row's probabilities are made of: softmax = exp((x - top) * scale) / total.
struct RowSums {
  float top;
  double total;
};

template <typename T>
QN_INLINE float row_max(const T* x, int64_t n) {
  const Vec lowest(-__builtin_inff());
  Vec top[kUnroll] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + kUnroll * Vec::kLanes <= n; i += kUnroll * Vec::kLanes) {
    for (int u = 0; u < kUnroll; ++u) top[u] = max(top[u], Vec::load(x + i + u * Vec::kLanes));
  }
  float largest = max(max(max(top[0], top[1]), max(top[2], top[3])));
  for (; i < n; ++i) {
    float lanes[Vec::kLanes];
    Vec::load(x + i, 1).store(lanes);
    if (!(lanes[0] <= largest)) largest = lanes[0];
  }
  return largest;
}

template <typename T>
RowSums row_sums(const T* x, int64_t n, float scale) {
  const float largest = row_max(x, n);
  const Vec factor(scale), top(largest);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    Vec sums[kUnroll] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    int64_t i = begin;
    for (; i + kUnroll * Vec::kLanes <= end; i += kUnroll * Vec::kLanes) {
      for (int u = 0; u < kUnroll; ++u) {
        sums[u] = sums[u] + exp((Vec::load(x + i + u * Vec::kLanes) - top) * factor);
      }
    }
    total += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < end; ++i) {
      float lanes[Vec::kLanes];
      exp((Vec::load(x + i, 1) - top) * factor).store(lanes);
      total += lanes[0];
    }
  }
  return {largest, total};
}

template <typename T>
float element(const T* x) {
  float lanes[Vec::kLanes];
  Vec::load(x, 1).store(lanes);
  return lanes[0];
}

/// x = factor * (one_hot(target) - softmax).
template <typename T>
void store_gradient(T* x, int64_t n, float scale, const RowSums& sums, int32_t target,
                    double factor) {
  const float at_target = element(x + target);
  const Vec logit_scale(scale), top(sums.top);
  const float weight = static_cast<float>(-factor / sums.total);
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const int count = n - i < Vec::kLanes ? static_cast<int>(n - i) : Vec::kLanes;
    const Vec p = exp((Vec::load(x + i, count) - top) * logit_scale);
    (p * Vec(weight)).store(x + i, count);
  }
  const double probability = ::exp((double{at_target} - sums.top) * scale) / sums.total;
  Vec(static_cast<float>(factor * (1 - probability))).store(x + target, 1);
}

template <typename T>
void xent_rows(const SoftmaxXentArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* x = static_cast<T*>(a.logits) + row * a.logits_stride;
    const int32_t target = a.targets[row];
    if (target < 0) {
      a.log_prob[row] = 0;
      if (a.grad != nullptr) memset(x, 0, static_cast<size_t>(a.vocab) * sizeof(T));
      continue;
    }
    const RowSums sums = row_sums(x, a.vocab, a.scale);
    a.log_prob[row] =
        static_cast<float>((double{element(x + target)} - sums.top) * a.scale - ::log(sums.total));
    if (a.grad != nullptr) {
      store_gradient(x, a.vocab, a.scale, sums, target, double{a.grad[row]} * a.scale);
    }
  }
}

}  // namespace

void softmax_xent(const SoftmaxXentArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::F32:
      return xent_rows<float>(args, begin, end);
    case DType::BF16:
      return xent_rows<bf16>(args, begin, end);
    default:
      __builtin_trap();
  }
}

}  // namespace qn::cpu::QN_ISA
