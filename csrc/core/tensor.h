// TensorView: a non-owning strided view of host memory; Tensor: an owning, contiguous one.
#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/allocator.h"
#include "core/dtype.h"

namespace qn {

/// At most four dimensions; strides count elements.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::F32;
  int rank = 0;
  std::array<int64_t, 4> shape{};
  std::array<int64_t, 4> stride{};

  TensorView() = default;
  /// A contiguous view.
  TensorView(void* data, DType dtype, std::initializer_list<int64_t> shape);

  int64_t size() const;
  bool contiguous() const;
  /// Rows [begin, end) of the first dimension.
  TensorView rows(int64_t begin, int64_t end) const;
  /// "f32[3, 896]", for messages.
  std::string describe() const;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

/// Owns its memory (64-byte aligned, huge pages when large); contents start uninitialised.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::initializer_list<int64_t> shape);

  const TensorView& view() const { return view_; }
  operator const TensorView&() const { return view_; }
  template <typename T>
  T* as() const {
    return view_.as<T>();
  }

 private:
  HostBuffer buffer_;
  TensorView view_;
};

}  // namespace qn
