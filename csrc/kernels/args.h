// One POD per kernel: pointers with their shapes, strides in elements. Ops fill and check these;
// kernels trust them.
#pragma once
#include <stdint.h>

#include "core/dtype.h"

namespace qn {

struct RmsNormArgs {
  void* out;           // [rows, cols]
  const void* x;       // [rows, cols]
  void* residual;      // [rows, cols], in-out, or null: residual += x, then out = norm(residual)
  const void* weight;  // [cols]
  int64_t cols;
  int64_t out_stride, x_stride, residual_stride;  // elements between rows
  float eps;
  DType dtype;         // of out, x and residual: F32 | BF16
  DType weight_dtype;  // F32 | BF16
};

}  // namespace qn
