// Python arrays as TensorViews: numpy arrays by the buffer protocol, everything else (torch) by
// DLPack. The view stays valid while the PyTensor lives.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "core/error.h"
#include "core/tensor.h"
#include "dlpack.h"

namespace qn::python {

namespace py = pybind11;

struct PyTensor {
  TensorView view;
  py::object owner;
};

inline DType dtype_from_dlpack(DLDataType type) {
  if (type.lanes == 1 && type.code == kDLFloat && type.bits == 32) return DType::F32;
  if (type.lanes == 1 && type.code == kDLBfloat && type.bits == 16) return DType::BF16;
  if (type.lanes == 1 && type.code == kDLInt && type.bits == 32) return DType::I32;
  throw ArgumentError(join_message("[tensor] dtype is DLPack code ", int{type.code}, " with ",
                                   int{type.bits}, " bits, expected float32, bfloat16 or int32"));
}

inline PyTensor tensor_from_numpy(const py::array& array) {
  PyTensor result;
  result.owner = array;
  if (py::isinstance<py::array_t<float>>(array)) {
    result.view.dtype = DType::F32;
  } else if (py::isinstance<py::array_t<int32_t>>(array)) {
    result.view.dtype = DType::I32;
  } else {
    throw ArgumentError("[tensor] dtype is " + py::str(array.dtype()).cast<std::string>() +
                        ", expected float32 or int32");
  }
  QN_CHECK(array.ndim() <= 4, "[tensor] rank is ", array.ndim(), ", expected at most 4");
  result.view.data = const_cast<void*>(array.data());
  result.view.rank = static_cast<int>(array.ndim());
  // numpy gives empty arrays strides of 0, which would look like a broadcast.
  int64_t dense = 1;
  for (int axis = result.view.rank - 1; axis >= 0; --axis) {
    result.view.shape[axis] = array.shape(axis);
    result.view.stride[axis] = array.size() > 0 ? array.strides(axis) / array.itemsize() : dense;
    dense *= array.shape(axis);
  }
  return result;
}

inline PyTensor tensor_from_dlpack(const py::object& object) {
  PyTensor result;
  py::capsule capsule = object.attr("__dlpack__")();
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  result.owner = capsule;  // an unconsumed capsule releases the tensor itself
  const DLTensor& tensor = managed->dl_tensor;
  QN_CHECK(tensor.device.device_type == kDLCpu, "[tensor] device type is ",
           tensor.device.device_type, ", expected the CPU");
  QN_CHECK(tensor.ndim <= 4, "[tensor] rank is ", tensor.ndim, ", expected at most 4");
  result.view.dtype = dtype_from_dlpack(tensor.dtype);
  result.view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  result.view.rank = tensor.ndim;
  int64_t dense = 1;
  for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
    result.view.shape[axis] = tensor.shape[axis];
    result.view.stride[axis] = tensor.strides != nullptr ? tensor.strides[axis] : dense;
    dense *= tensor.shape[axis];
  }
  return result;
}

inline PyTensor to_tensor(const py::object& object) {
  if (py::isinstance<py::array>(object)) return tensor_from_numpy(object.cast<py::array>());
  if (py::hasattr(object, "__dlpack__")) return tensor_from_dlpack(object);
  throw py::type_error("expected a numpy array or an object with __dlpack__, got " +
                       py::str(py::type::of(object)).cast<std::string>());
}

}  // namespace qn::python

namespace pybind11::detail {

template <>
struct type_caster<qn::python::PyTensor> {
 public:
  PYBIND11_TYPE_CASTER(qn::python::PyTensor, const_name("Array"));
  bool load(handle source, bool) {
    value = qn::python::to_tensor(reinterpret_borrow<object>(source));
    return true;
  }
};

}  // namespace pybind11::detail
