#include "op_cases.h"

#include <algorithm>
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

template <typename T>
void add_rope(std::vector<OpCase>& cases, int64_t tokens, int64_t heads, int64_t head_dim,
              int64_t half) {
  OpCase c;
  c.op = "rope";
  c.what = join_message(dtype_name(dtype_of<T>()), "[", tokens, ", ", heads, ", ", head_dim,
                        "] rope_dim ", 2 * half);
  c.narrow = std::is_same_v<T, bf16>;
  const auto x = random_values<T>(tokens * heads * head_dim, 1);
  std::vector<float> cosine, sine;
  for (int64_t i = 0; i < tokens * half; ++i) {
    cosine.push_back(std::cos(0.37f * static_cast<float>(i)));
    sine.push_back(std::sin(0.37f * static_cast<float>(i)));
  }
  c.run = [=](const ExecContext& context) {
    Guarded<T> out(x);
    ops::rope(out.view({tokens, heads, head_dim}), view_of(cosine, {tokens, half}),
              view_of(sine, {tokens, half}), context);
    std::vector<float> result;
    out.collect(result);
    return result;
  };
  c.reference = [=] {
    std::vector<double> out;
    for (int64_t i = 0; i < tokens * heads * head_dim; ++i) {
      const int64_t dim = i % head_dim, angle = i / (heads * head_dim) * half + dim % half;
      const double value = widen(x[i]);
      if (dim < half) {
        out.push_back(value * cosine[angle] - widen(x[i + half]) * double{sine[angle]});
      } else if (dim < 2 * half) {
        out.push_back(value * cosine[angle] + widen(x[i - half]) * double{sine[angle]});
      } else {
        out.push_back(value);
      }
    }
    return out;
  };
  cases.push_back(std::move(c));
}

template <typename T>
void add_swiglu(std::vector<OpCase>& cases, int64_t tokens, int64_t inter) {
  OpCase c;
  c.op = "swiglu";
  c.what = join_message(dtype_name(dtype_of<T>()), "[", tokens, ", ", inter, "]");
  c.policy = Policy::Pointwise;
  c.narrow = std::is_same_v<T, bf16>;
  const auto gate = random_values<T>(tokens * inter, 1, 4.0f);
  const auto up = random_values<T>(tokens * inter, 2);
  c.run = [=](const ExecContext& context) {
    Guarded<T> out(tokens * inter);
    ops::swiglu(out.view({tokens, inter}), view_of(gate, {tokens, inter}),
                view_of(up, {tokens, inter}), context);
    std::vector<float> result;
    out.collect(result);
    return result;
  };
  c.reference = [=] {
    std::vector<double> out;
    for (size_t i = 0; i < gate.size(); ++i) {
      const double g = widen(gate[i]);
      out.push_back(g / (1 + std::exp(-g)) * widen(up[i]));
    }
    return out;
  };
  cases.push_back(std::move(c));
}

template <typename T>
void add_rms_norm_bwd(std::vector<OpCase>& cases, int64_t rows, int64_t cols, bool with_residual) {
  OpCase c;
  c.op = "rms_norm_bwd";
  c.what = join_message(dtype_name(dtype_of<T>()), "[", rows, ", ", cols, "]",
                        with_residual ? " residual" : "");
  c.narrow = std::is_same_v<T, bf16>;
  constexpr float kEps = 1e-6f;
  const auto x = random_values<T>(rows * cols, 1), dy = random_values<T>(rows * cols, 2);
  const auto residual = random_values<T>(rows * cols, 3), weight = random_values<T>(cols, 4);
  c.run = [=](const ExecContext& context) {
    Guarded<T> dx(rows * cols), dweight(cols);
    const TensorView residual_view = view_of(residual, {rows, cols});
    ops::rms_norm_bwd(dx.view({rows, cols}), dweight.view({cols}), view_of(dy, {rows, cols}),
                      view_of(x, {rows, cols}), view_of(weight, {cols}), kEps,
                      with_residual ? &residual_view : nullptr, context);
    std::vector<float> result;
    dx.collect(result);
    dweight.collect(result);
    return result;
  };
  c.reference = [=] {
    std::vector<double> dx, dweight(static_cast<size_t>(cols));
    for (int64_t row = 0; row < rows; ++row) {
      double squares = 0, products = 0;
      for (int64_t i = 0; i < cols; ++i) {
        const double value = widen(x[row * cols + i]);
        squares += value * value;
        products += value * widen(dy[row * cols + i]) * widen(weight[i]);
      }
      const double norm = 1 / std::sqrt(squares / static_cast<double>(cols) + kEps);
      for (int64_t i = 0; i < cols; ++i) {
        const double value = widen(x[row * cols + i]), grad = widen(dy[row * cols + i]);
        const double mean = products / static_cast<double>(cols);
        dx.push_back(norm * (grad * widen(weight[i]) - value * norm * norm * mean) +
                     (with_residual ? widen(residual[row * cols + i]) : 0.0f));
        dweight[i] += grad * value * norm;
      }
    }
    dx.insert(dx.end(), dweight.begin(), dweight.end());
    return dx;
  };
  cases.push_back(std::move(c));
}

template <typename T>
void add_swiglu_bwd(std::vector<OpCase>& cases, int64_t tokens, int64_t inter) {
  OpCase c;
  c.op = "swiglu_bwd";
  c.what = join_message(dtype_name(dtype_of<T>()), "[", tokens, ", ", inter, "]");
  c.narrow = std::is_same_v<T, bf16>;
  const auto gate = random_values<T>(tokens * inter, 1, 4.0f);
  const auto up = random_values<T>(tokens * inter, 2), dout = random_values<T>(tokens * inter, 3);
  c.run = [=](const ExecContext& context) {
    Guarded<T> dgate(tokens * inter), dup(tokens * inter);
    ops::swiglu_bwd(dgate.view({tokens, inter}), dup.view({tokens, inter}),
                    view_of(dout, {tokens, inter}), view_of(gate, {tokens, inter}),
                    view_of(up, {tokens, inter}), context);
    std::vector<float> result;
    dgate.collect(result);
    dup.collect(result);
    return result;
  };
  c.reference = [=] {
    std::vector<double> dgate, dup;
    for (size_t i = 0; i < gate.size(); ++i) {
      const double g = widen(gate[i]), d = widen(dout[i]), sigmoid = 1 / (1 + std::exp(-g));
      dgate.push_back(d * widen(up[i]) * sigmoid * (1 + g * (1 - sigmoid)));
      dup.push_back(d * g * sigmoid);
    }
    dgate.insert(dgate.end(), dup.begin(), dup.end());
    return dgate;
  };
  cases.push_back(std::move(c));
}

/// The last row has no target.
template <typename T>
void add_softmax_xent(std::vector<OpCase>& cases, int64_t vocab) {
  constexpr int64_t kRows = 5;
  constexpr float kScale = 0.75f;
  OpCase c;
  c.op = "softmax_xent";
  c.what = join_message(dtype_name(dtype_of<T>()), " vocab ", vocab);
  c.narrow = std::is_same_v<T, bf16>;
  const auto logits = random_values<T>(kRows * vocab, 1, 3.0f);
  const auto grad = random_values<float>(kRows, 2);
  const std::vector<int32_t> targets = {0, static_cast<int32_t>(vocab - 1), 0,
                                        static_cast<int32_t>(vocab / 2), -1};
  c.run = [=](const ExecContext& context) {
    Guarded<T> rows(logits);
    Guarded<float> log_prob(kRows);
    const TensorView grad_view = view_of(grad, {kRows});
    ops::softmax_xent(log_prob.view({kRows}), rows.view({kRows, vocab}), view_of(targets, {kRows}),
                      kScale, &grad_view, context);
    std::vector<float> result;
    rows.collect(result);
    log_prob.collect(result);
    return result;
  };
  c.reference = [=] {
    std::vector<double> dlogits, log_probs;
    for (int64_t row = 0; row < kRows; ++row) {
      const T* x = logits.data() + row * vocab;
      double total = 0;
      for (int64_t i = 0; i < vocab; ++i) total += std::exp(double{widen(x[i])} * kScale);
      for (int64_t i = 0; i < vocab; ++i) {
        const double p = std::exp(double{widen(x[i])} * kScale) / total;
        const double factor = targets[row] < 0 ? 0 : double{grad[row]} * kScale;
        dlogits.push_back(factor * ((i == targets[row]) - p));
      }
      log_probs.push_back(
          targets[row] < 0 ? 0 : double{widen(x[targets[row]])} * kScale - std::log(total));
    }
    dlogits.insert(dlogits.end(), log_probs.begin(), log_probs.end());
    return dlogits;
  };
  cases.push_back(std::move(c));
}

template <typename W>
constexpr WeightFormat weight_format() {
  return std::is_same_v<W, bf16> ? WeightFormat::BF16 : WeightFormat::F32;
}

/// Rows of float tables come back as they are.
template <typename W>
void add_gather(std::vector<OpCase>& cases, int64_t cols) {
  constexpr int64_t kRows = 11, kTokens = 5;
  OpCase c;
  c.op = "gather";
  c.what = join_message(dtype_name(dtype_of<W>()), " cols ", cols);
  c.policy = Policy::Exact;
  const auto table = random_values<W>(kRows * cols, 1);
  const std::vector<int32_t> ids = {10, 0, 3, 3, 7};
  c.run = [=](const ExecContext& context) {
    Guarded<float> out(kTokens * cols);
    ops::gather(out.view({kTokens, cols}), view_of(ids, {kTokens}),
                {table.data(), weight_format<W>(), kRows, cols, cols}, context);
    std::vector<float> result;
    out.collect(result);
    return result;
  };
  c.reference = [=] {
    std::vector<double> out;
    for (int32_t id : ids) {
      for (int64_t i = 0; i < cols; ++i) out.push_back(widen(table[id * cols + i]));
    }
    return out;
  };
  cases.push_back(std::move(c));
}

/// x is rounded to bf16 beforehand, so that the levels that do that have the same inputs.
template <typename W>
void add_linear(std::vector<OpCase>& cases, int64_t tokens, int64_t rows, int64_t cols, bool add) {
  OpCase c;
  c.op = "linear";
  c.what = join_message(dtype_name(dtype_of<W>()), " ", tokens, "x", cols, " -> ", rows,
                        add ? " add" : " bias");
  std::vector<float> x;
  for (bf16 value : random_values<bf16>(tokens * cols, 1)) x.push_back(widen(value));
  const auto weight = random_values<W>(rows * cols, 2);
  const auto bias = random_values<float>(add ? 0 : rows, 3);
  const auto before = random_values<float>(tokens * rows, 4);
  c.run = [=](const ExecContext& context) {
    Guarded<float> out(before);
    const ops::LinearSegment segment{
        {weight.data(), weight_format<W>(), rows, cols, cols}, add ? nullptr : bias.data(), 0};
    ops::linear(out.view({tokens, rows}), view_of(x, {tokens, cols}), {&segment, 1},
                add ? ops::Epilogue::Add : ops::Epilogue::Store, true, context);
    std::vector<float> result;
    out.collect(result);
    return result;
  };
  c.reference = [=] {
    std::vector<double> out;
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t row = 0; row < rows; ++row) {
        double sum = add ? before[token * rows + row] : bias[row];
        for (int64_t i = 0; i < cols; ++i) {
          sum += double{x[token * cols + i]} * widen(weight[row * cols + i]);
        }
        out.push_back(sum);
      }
    }
    return out;
  };
  cases.push_back(std::move(c));
}

std::vector<char> pack_int8(const std::vector<float>& weight, int64_t rows, int64_t cols,
                            const ExecContext& context) {
  std::vector<char> packed(ops::weight_bytes(WeightFormat::Int8, rows, cols));
  ops::pack_weight(packed.data(), WeightFormat::Int8, rows, cols, SourceType::F32, weight.data(),
                   context);
  return packed;
}

/// Whole numbers whose scales are 1, because every 64th is 127: the result is exact.
void add_linear_int8(std::vector<OpCase>& cases, int64_t tokens, int64_t rows, int64_t cols,
                     bool add) {
  OpCase c;
  c.op = "linear";
  c.what = join_message("int8 ", tokens, "x", cols, " -> ", rows, add ? " add" : "");
  c.policy = Policy::Exact;
  const auto whole = [cols](int64_t lines, uint32_t seed) {
    std::vector<float> values = random_values<float>(lines * cols, seed, 3.0f);
    for (int64_t i = 0; i < lines * cols; ++i) {
      float& value = values[static_cast<size_t>(i)];
      value = i % cols % 64 == 0 ? 127.0f : std::round(value);
    }
    return values;
  };
  const auto x = whole(tokens, 1), weight = whole(rows, 2);
  const std::vector<float> before(static_cast<size_t>(tokens * rows), 3.0f);
  c.run = [=](const ExecContext& context) {
    const std::vector<char> packed = pack_int8(weight, rows, cols, context);
    Guarded<float> out(before);
    const ops::LinearSegment segment{
        {packed.data(), WeightFormat::Int8, rows, cols, cols}, nullptr, 0};
    ops::linear(out.view({tokens, rows}), view_of(x, {tokens, cols}), {&segment, 1},
                add ? ops::Epilogue::Add : ops::Epilogue::Store, false, context);
    std::vector<float> result;
    out.collect(result);
    return result;
  };
  c.reference = [=] {
    std::vector<double> out;
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t row = 0; row < rows; ++row) {
        double sum = add ? 3.0 : 0.0;
        for (int64_t i = 0; i < cols; ++i) {
          sum += double{x[token * cols + i]} * weight[row * cols + i];
        }
        out.push_back(sum);
      }
    }
    return out;
  };
  cases.push_back(std::move(c));
}

void add_mlp_int8(std::vector<OpCase>& cases, int64_t tokens, int64_t hidden, int64_t inter) {
  OpCase c;
  c.op = "mlp";
  c.what = join_message("int8 ", tokens, "x", hidden, " ", inter);
  const auto x = random_values<float>(tokens * hidden, 1);
  const auto gate = random_values<float>(inter * hidden, 2), up = gate;
  const auto down = random_values<float>(hidden * inter, 3);
  c.run = [=](const ExecContext& context) {
    const auto packed_gate = pack_int8(gate, inter, hidden, context);
    const auto packed_up = pack_int8(up, inter, hidden, context);
    const auto packed_down = pack_int8(down, hidden, inter, context);
    Guarded<float> out(std::vector<float>(static_cast<size_t>(tokens * hidden), 0.0f));
    const auto view = [](const std::vector<char>& data, int64_t rows, int64_t cols) {
      return WeightView{data.data(), WeightFormat::Int8, rows, cols, cols};
    };
    ops::mlp(out.view({tokens, hidden}), view_of(x, {tokens, hidden}),
             {view(packed_gate, inter, hidden), view(packed_up, inter, hidden),
              view(packed_down, hidden, inter)},
             false, context);
    std::vector<float> result;
    out.collect(result);
    return result;
  };
  c.reference = [=] {
    const auto dot = [](const float* a, const auto* b, int64_t n) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += double{a[i]} * b[i];
      return sum;
    };
    std::vector<double> out;
    for (int64_t token = 0; token < tokens; ++token) {
      std::vector<double> inner;
      for (int64_t row = 0; row < inter; ++row) {
        const double g = dot(&x[token * hidden], &gate[row * hidden], hidden);
        inner.push_back(g / (1 + std::exp(-g)) *
                        dot(&x[token * hidden], &up[row * hidden], hidden));
      }
      for (int64_t row = 0; row < hidden; ++row) {
        out.push_back(dot(&down[row * inter], inner.data(), inter));
      }
    }
    return out;
  };
  cases.push_back(std::move(c));
}

/// argmax is compared exactly, log_sum_exp as a contraction.
void add_reductions(std::vector<OpCase>& cases, int64_t n) {
  const auto x = random_values<float>(n, 1, 5.0f);
  OpCase largest;
  largest.op = "argmax";
  largest.what = join_message(n);
  largest.policy = Policy::Exact;
  largest.run = [=](const ExecContext& context) {
    return std::vector<float>{static_cast<float>(ops::argmax(view_of(x, {n}), context))};
  };
  largest.reference = [=] {
    return std::vector<double>{
        static_cast<double>(std::max_element(x.begin(), x.end()) - x.begin())};
  };
  cases.push_back(std::move(largest));
  OpCase total;
  total.op = "log_sum_exp";
  total.what = join_message(n);
  total.policy = Policy::Pointwise;
  total.run = [=](const ExecContext& context) {
    return std::vector<float>{ops::log_sum_exp(view_of(x, {n}), context)};
  };
  total.reference = [=] {
    double sum = 0;
    for (float value : x) sum += std::exp(double{value});
    return std::vector<double>{std::log(sum)};
  };
  cases.push_back(std::move(total));
}

template <typename T>
void add_typed_cases(std::vector<OpCase>& cases) {
  for (int64_t half : {1, 16, 33}) add_rope<T>(cases, 3, 2, 66, half);
  for (const auto& [tokens, inter] : {std::pair{0, 8}, {1, 1}, {3, 1023}, {2, 1025}}) {
    add_swiglu<T>(cases, tokens, inter);
    add_swiglu_bwd<T>(cases, tokens, inter);
  }
  for (const auto& [rows, cols] : {std::pair{0, 64}, {3, 17}, {32, 64}, {33, 65}, {70, 130}}) {
    for (bool with_residual : {false, true}) add_rms_norm_bwd<T>(cases, rows, cols, with_residual);
  }
  for (int64_t vocab : {17, 64, 1025}) add_softmax_xent<T>(cases, vocab);
  for (int64_t cols : {1, 17, 64}) add_gather<T>(cases, cols);
  for (int64_t tokens : {0, 1, 2, 17, 33}) {
    for (bool add : {false, true}) {
      add_linear<T>(cases, tokens, 131, 67, add);  // the worst of fewer outputs says little
      add_linear<T>(cases, tokens, 160, 1280, add);
    }
  }
}

}  // namespace

std::vector<OpCase> op_cases() {
  std::vector<OpCase> cases;
  add_rms_norm_cases(cases);
  add_typed_cases<float>(cases);
  add_typed_cases<bf16>(cases);
  for (int64_t n : {1, 127, 129, 1000}) add_reductions(cases, n);
  for (int64_t tokens : {1, 2, 17, 40}) {
    for (bool add : {false, true}) {
      add_linear_int8(cases, tokens, 131, 67, add);
      add_linear_int8(cases, tokens, 160, 1280, add);
    }
    add_mlp_int8(cases, tokens, 67, 131);
  }
  return cases;
}

}  // namespace qn::test
