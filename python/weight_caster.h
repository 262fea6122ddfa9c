// Weight matrices of Python as WeightViews: a float matrix, a PackedWeight or a GpuWeight. The view
// stays valid while the PyWeight lives.
#pragma once
#include "packed_weight.h"
#include "tensor_caster.h"

namespace qn::python {

struct PyWeight {
  WeightView view;
  py::object owner;
  OpDevice device;
};

inline PyWeight plain_weight(const py::object& matrix) {
  const PyDeviceTensor tensor = to_device_tensor(matrix);
  const TensorView& view = tensor.view;
  QN_CHECK(view.rank == 2 && (view.dtype == DType::F32 || view.dtype == DType::BF16) &&
               (view.shape[1] <= 1 || view.stride[1] == 1),
           "[weight] data is ", view.describe(),
           ", expected f32|bf16[rows, cols] with a dense last axis");
  const WeightFormat format = view.dtype == DType::F32 ? WeightFormat::F32 : WeightFormat::BF16;
  return {{view.data, format, view.shape[0], view.shape[1], view.stride[0]},
          tensor.owner,
          tensor.device};
}

inline void meet(const OpDevice*& all, const PyWeight& weight) { meet(all, weight.device); }

}  // namespace qn::python

namespace pybind11::detail {

template <>
struct type_caster<qn::python::PyWeight> {
 public:
  PYBIND11_TYPE_CASTER(qn::python::PyWeight, const_name("Weight"));
  bool load(handle source, bool) {
    if (isinstance<qn::python::PackedWeight>(source)) {
      value = {source.cast<const qn::python::PackedWeight&>().view,
               reinterpret_borrow<object>(source),
               {}};
    } else if (isinstance<qn::python::GpuWeight>(source)) {
      const auto& weight = source.cast<const qn::python::GpuWeight&>();
      value = {weight.view, reinterpret_borrow<object>(source), weight.data.device};
    } else {
      value = qn::python::plain_weight(reinterpret_borrow<object>(source));
    }
    return true;
  }
};

}  // namespace pybind11::detail
