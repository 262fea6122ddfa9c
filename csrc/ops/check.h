// Checks that several ops share; each names the op and the tensor.
#pragma once
#include "core/error.h"
#include "core/tensor.h"

namespace qn::ops {

inline void check_float(const char* op, const char* name, const TensorView& tensor) {
  QN_CHECK(tensor.dtype == DType::F32 || tensor.dtype == DType::BF16, "[", op, "] ", name, " is ",
           dtype_name(tensor.dtype), ", expected f32 or bf16");
}

inline void check_dense_rows(const char* op, const char* name, const TensorView& tensor) {
  if (tensor.size() == 0) return;  // numpy gives empty arrays the stride 0
  QN_CHECK(tensor.rank >= 1 &&
               (tensor.shape[tensor.rank - 1] <= 1 || tensor.stride[tensor.rank - 1] == 1),
           "[", op, "] ", name, " has stride ",
           tensor.rank >= 1 ? tensor.stride[tensor.rank - 1] : 0,
           " along its last axis, expected 1");
}

inline void check_vector(const char* op, const char* name, const TensorView& tensor, DType dtype,
                         int64_t size) {
  QN_CHECK(
      tensor.dtype == dtype && tensor.rank == 1 && tensor.shape[0] == size && tensor.contiguous(),
      "[", op, "] ", name, " is ", tensor.describe(), ", expected dense ", dtype_name(dtype), "[",
      size, "]");
}

inline void check_same_shape(const char* op, const char* name, const TensorView& tensor,
                             const char* other_name, const TensorView& other) {
  bool same = tensor.rank == other.rank && tensor.dtype == other.dtype;
  for (int axis = 0; same && axis < tensor.rank; ++axis)
    same = tensor.shape[axis] == other.shape[axis];
  QN_CHECK(same, "[", op, "] ", name, " is ", tensor.describe(), ", expected ", other.describe(),
           " as ", other_name);
}

}  // namespace qn::ops
