// Random inputs, guarded outputs and the tolerance policy of tests/tolerance.py in C++.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"
#include "core/tensor.h"
#include "kernels/scalar.h"
#include "op_cases.h"

namespace qn::test {

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return math::base::bf16_to_float(value); }
inline float widen(int32_t value) { return static_cast<float>(value); }

template <typename T>
T narrow_to(float value) {
  if constexpr (std::is_same_v<T, bf16>) return math::base::float_to_bf16(value);
  if constexpr (std::is_same_v<T, float>) return value;
}

template <typename T>
constexpr DType dtype_of() {
  return std::is_same_v<T, bf16> ? DType::BF16 : std::is_same_v<T, float> ? DType::F32 : DType::I32;
}

/// Normal numbers; the heap block is exactly as large as the data, so that AddressSanitizer sees
/// every read beyond it.
template <typename T>
std::vector<T> random_values(int64_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = narrow_to<T>(normal(engine));
  return values;
}

template <typename T>
TensorView view_of(const std::vector<T>& values, std::initializer_list<int64_t> shape) {
  return TensorView(const_cast<T*>(values.data()), dtype_of<T>(), shape);
}

/// An output of `count` elements that start as NaN, with guard bytes on both sides.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(static_cast<size_t>(count)), bytes_(size()) {
    std::memset(bytes_.data(), 0xff, bytes_.size());  // NaN as f32 and as bf16
    std::memset(bytes_.data(), kGuardByte, kGuard);
    std::memset(bytes_.data() + bytes_.size() - kGuard, kGuardByte, kGuard);
  }
  explicit Guarded(const std::vector<T>& values) : Guarded(static_cast<int64_t>(values.size())) {
    if (!values.empty()) std::memcpy(data(), values.data(), values.size() * sizeof(T));
  }

  T* data() { return reinterpret_cast<T*>(bytes_.data() + kGuard); }
  TensorView view(std::initializer_list<int64_t> shape) {
    return TensorView(data(), dtype_of<T>(), shape);
  }

  /// Appends the elements to `out` after looking at the guards.
  void collect(std::vector<float>& out) {
    const auto intact = [](unsigned char byte) { return byte == kGuardByte; };
    QN_CHECK(std::all_of(bytes_.begin(), bytes_.begin() + kGuard, intact),
             "wrote before the start of the output");
    QN_CHECK(std::all_of(bytes_.end() - kGuard, bytes_.end(), intact),
             "wrote behind the end of the output");
    for (size_t i = 0; i < count_; ++i) out.push_back(widen(data()[i]));
  }

 private:
  static constexpr std::ptrdiff_t kGuard = 256;
  static constexpr unsigned char kGuardByte = 0xA5;
  size_t size() const { return count_ * sizeof(T) + 2 * kGuard; }

  size_t count_;
  std::vector<unsigned char> bytes_;
};

struct ErrorSize {
  double max_ulp = 0, max = 0, rms = 0, reference_rms = 0;
};

inline ErrorSize error_size(const std::vector<float>& out, const std::vector<double>& ref,
                            int mantissa_bits) {
  ErrorSize size;
  for (size_t i = 0; i < ref.size(); ++i) {
    const double error = std::abs(out[i] - ref[i]);
    const int exponent = ref[i] == 0 ? -126 : std::max(-126, std::ilogb(ref[i]));
    size.max_ulp = std::max(size.max_ulp, error / std::ldexp(1.0, exponent - mantissa_bits));
    size.max = std::max(size.max, error);
    size.rms += error * error;
    size.reference_rms += ref[i] * ref[i];
  }
  const double count = std::max<double>(1, static_cast<double>(ref.size()));
  size.rms = std::sqrt(size.rms / count);
  size.reference_rms = std::sqrt(size.reference_rms / count);
  return size;
}

/// Empty when `out` is good enough, else what is wrong with it.
inline std::string compare(Policy policy, bool narrow, const std::vector<float>& out,
                           const std::vector<double>& ref, const std::vector<float>& base) {
  if (out.size() != ref.size() || base.size() != ref.size()) {
    return join_message("gave ", out.size(), " elements, expected ", ref.size());
  }
  for (size_t i = 0; i < out.size(); ++i) {
    if (!std::isfinite(out[i]))
      return join_message("element ", i, " is ", out[i], ", expected ", ref[i]);
    if (policy == Policy::Exact && static_cast<double>(out[i]) != ref[i]) {
      return join_message("element ", i, " is ", out[i], ", expected exactly ", ref[i]);
    }
  }
  const int mantissa_bits = narrow ? 7 : 23;
  const ErrorSize error = error_size(out, ref, mantissa_bits);
  const ErrorSize limit = error_size(base, ref, mantissa_bits);
  if (policy == Policy::Pointwise && error.max_ulp > std::max(2 * limit.max_ulp, 2.0)) {
    return join_message("error ", error.max_ulp, " ulp, base has ", limit.max_ulp);
  }
  if (policy == Policy::Contraction) {
    const double slack = std::ldexp(limit.reference_rms, -mantissa_bits);
    if (error.max > 2 * limit.max + slack / 4) {
      return join_message("max error ", error.max, ", base has ", limit.max);
    }
    if (error.rms > 2 * limit.rms + slack / 16) {
      return join_message("rms error ", error.rms, ", base has ", limit.rms);
    }
  }
  return "";
}

}  // namespace qn::test
