#include "core/tensor.h"

#include <sstream>

#include "core/error.h"

namespace qn {

TensorView::TensorView(void* data_, DType dtype_, std::initializer_list<int64_t> shape_)
    : data(data_), dtype(dtype_), rank(static_cast<int>(shape_.size())) {
  QN_CHECK(shape_.size() <= 4, "[tensor] rank is ", shape_.size(), ", expected at most 4");
  int axis = 0;
  for (int64_t extent : shape_) shape[axis++] = extent;
  int64_t step = 1;
  for (axis = rank - 1; axis >= 0; --axis) {
    stride[axis] = step;
    step *= shape[axis];
  }
}

int64_t TensorView::size() const {
  int64_t count = 1;
  for (int axis = 0; axis < rank; ++axis) count *= shape[axis];
  return count;
}

bool TensorView::contiguous() const {
  int64_t step = 1;
  for (int axis = rank - 1; axis >= 0; --axis) {
    if (shape[axis] != 1 && stride[axis] != step) return false;
    step *= shape[axis];
  }
  return true;
}

TensorView TensorView::rows(int64_t begin, int64_t end) const {
  TensorView part = *this;
  part.data =
      static_cast<char*>(data) + begin * stride[0] * static_cast<int64_t>(dtype_size(dtype));
  part.shape[0] = end - begin;
  return part;
}

std::string TensorView::describe() const {
  std::ostringstream text;
  text << dtype_name(dtype) << '[';
  for (int axis = 0; axis < rank; ++axis) text << (axis ? ", " : "") << shape[axis];
  text << ']';
  return text.str();
}

Tensor::Tensor(DType dtype, std::initializer_list<int64_t> shape) {
  view_ = TensorView(nullptr, dtype, shape);
  buffer_ = HostBuffer(static_cast<size_t>(view_.size()) * dtype_size(dtype));
  view_.data = buffer_.data();
}

}  // namespace qn
