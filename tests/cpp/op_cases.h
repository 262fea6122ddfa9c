// One case per op, shape and switch: how to run the op, and what it should give in double
// precision.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "core/context.h"

namespace qn::test {

/// How close is close enough (docs/NUMERICS.md); `base` is the scalar level's result.
enum class Policy {
  Pointwise,    // at most twice base's worst error in ulps; 2 ulps always pass
  Contraction,  // at most twice base's error, in maximum and in mean square, and a little
  Exact,        // equal
};

struct OpCase {
  std::string op;    // name in csrc/ops/ops.h
  std::string what;  // shape, dtype, variant
  Policy policy = Policy::Contraction;
  bool narrow = false;  // outputs are bf16
  /// Runs the op at the active level on fixed inputs and returns its outputs, widened. Throws Error
  /// when a byte outside the outputs was written.
  std::function<std::vector<float>(const ExecContext&)> run;
  std::function<std::vector<double>()> reference;
  /// For timing: allocates a model-sized case and returns a function that runs just the op. Empty
  /// in cases that only test.
  std::function<std::function<void(const ExecContext&)>()> perf = {};
  double bytes = 0;  // read and written by one such run
  double flops = 0;
};

std::vector<OpCase> op_cases();

}  // namespace qn::test
