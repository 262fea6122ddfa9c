#include "op_cases.h"

#include <cmath>
#include <memory>

#include "compare.h"
#include "ops/ops.h"

namespace qn::test {
namespace {

template <typename T>
void add_rms_norm(std::vector<OpCase>& cases, int64_t rows, int64_t cols, bool with_residual,
                  float scale) {
  OpCase c;
  c.op = "rms_norm";
  c.what = join_message(dtype_name(dtype_of<T>()), "[", rows, ", ", cols, "] scale ", scale,
                        with_residual ? " residual" : "");
  c.policy = Policy::Pointwise;
  c.narrow = std::is_same_v<T, bf16>;
  constexpr float kEps = 1e-6f;
  const auto x = random_values<T>(rows * cols, 1, scale);
  const auto residual = random_values<T>(with_residual ? rows * cols : 0, 2, scale);
  const auto weight = random_values<float>(cols, 3);
  c.run = [=](const ExecContext& context) {
    Guarded<T> out(rows * cols), total(residual);
    const TensorView total_view = total.view({rows, cols});
    ops::rms_norm(out.view({rows, cols}), view_of(x, {rows, cols}), view_of(weight, {cols}), kEps,
                  with_residual ? &total_view : nullptr, context);
    std::vector<float> result;
    out.collect(result);
    total.collect(result);
    return result;
  };
  c.reference = [=] {
    std::vector<double> out, totals;
    for (int64_t row = 0; row < rows; ++row) {
      double squares = 0;
      std::vector<double> values;
      for (int64_t i = row * cols; i < (row + 1) * cols; ++i) {
        double value = widen(x[i]);
        if (with_residual) {
          // The norm is taken of the sum as it was stored.
          value = widen(narrow_to<T>(widen(x[i]) + widen(residual[i])));
          totals.push_back(value);
        }
        values.push_back(value);
        squares += value * value;
      }
      const double factor = 1 / std::sqrt(squares / static_cast<double>(cols) + kEps);
      for (int64_t i = 0; i < cols; ++i) out.push_back(values[i] * factor * weight[i]);
    }
    out.insert(out.end(), totals.begin(), totals.end());
    return out;
  };
  cases.push_back(std::move(c));
}

void add_rms_norm_cases(std::vector<OpCase>& cases) {
  for (const auto& [rows, cols] :
       {std::pair{0, 64}, {1, 1}, {3, 17}, {7, 63}, {7, 64}, {7, 65}, {33, 896}}) {
    for (bool with_residual : {false, true}) {
      for (float scale : {1e-3f, 1.0f, 1e3f}) {
        add_rms_norm<float>(cases, rows, cols, with_residual, scale);
        add_rms_norm<bf16>(cases, rows, cols, with_residual, scale);
      }
    }
  }
  constexpr int64_t kRows = 512, kCols = 2048;
  cases.back().bytes = 2.0 * kRows * kCols * sizeof(float);
  cases.back().perf = [] {
    const auto x = random_values<float>(kRows * kCols, 1), weight = random_values<float>(kCols, 2);
    auto out = std::make_shared<std::vector<float>>(x.size());
    return [=](const ExecContext& context) {
      ops::rms_norm(view_of(*out, {kRows, kCols}), view_of(x, {kRows, kCols}),
                    view_of(weight, {kCols}), 1e-6f, nullptr, context);
    };
  };
}

}  // namespace

std::vector<OpCase> op_cases() {
  std::vector<OpCase> cases;
  add_rms_norm_cases(cases);
  return cases;
}

}  // namespace qn::test
