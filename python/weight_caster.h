// Weight matrices of Python as WeightViews: a float matrix, or (bytes, format, rows, cols) for the
// packed formats. The view stays valid while the PyWeight lives.
#pragma once
#include <string>

#include "kernels/quant_layout.h"
#include "ops/ops.h"
#include "tensor_caster.h"

namespace qn::python {

struct PyWeight {
  WeightView view;
  py::object owner;
};

inline WeightFormat weight_format_from_name(const std::string& name) {
  if (name == "int8") return WeightFormat::Int8;
  if (name == "int4_symmetric") return WeightFormat::Int4Symmetric;
  if (name == "int4") return WeightFormat::Int4;
  throw ArgumentError("[weight] format is '" + name +
                      "', expected one of int8, int4_symmetric, int4");
}

inline PyWeight plain_weight(const py::object& matrix) {
  const PyTensor tensor = to_tensor(matrix);
  const TensorView& view = tensor.view;
  QN_CHECK(
      view.rank == 2 && view.dtype != DType::I32 && (view.shape[1] <= 1 || view.stride[1] == 1),
      "[weight] data is ", view.describe(),
      ", expected f32|bf16[rows, cols] with a dense last axis");
  const WeightFormat format = view.dtype == DType::F32 ? WeightFormat::F32 : WeightFormat::BF16;
  return {{view.data, format, view.shape[0], view.shape[1], view.stride[0]}, tensor.owner};
}

inline PyWeight packed_weight(const py::array_t<uint8_t>& data, const std::string& format_name,
                              int64_t rows, int64_t cols) {
  const WeightFormat format = weight_format_from_name(format_name);
  QN_CHECK(rows > 0 && cols > 0, "[weight] shape is [", rows, ", ", cols,
           "], expected positive sizes");
  const int64_t expected = panel_count(rows) * panel_bytes(format, cols);
  QN_CHECK(data.ndim() == 1 && data.size() == expected && (data.flags() & py::array::c_style),
           "[weight] data has ", data.size(), " bytes, expected ", expected, " dense bytes for ",
           format_name, "[", rows, ", ", cols, "]");
  return {{data.data(), format, rows, cols, 0}, data};
}

}  // namespace qn::python

namespace pybind11::detail {

template <>
struct type_caster<qn::python::PyWeight> {
 public:
  PYBIND11_TYPE_CASTER(qn::python::PyWeight, const_name("Weight"));
  bool load(handle source, bool) {
    if (isinstance<tuple>(source)) {
      const auto parts = reinterpret_borrow<tuple>(source);
      if (parts.size() != 4 || !isinstance<array_t<uint8_t>>(parts[0])) return false;
      value =
          qn::python::packed_weight(parts[0].cast<array_t<uint8_t>>(), parts[1].cast<std::string>(),
                                    parts[2].cast<int64_t>(), parts[3].cast<int64_t>());
    } else {
      value = qn::python::plain_weight(reinterpret_borrow<object>(source));
    }
    return true;
  }
};

}  // namespace pybind11::detail
