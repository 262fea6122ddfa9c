// Python arrays as TensorViews: numpy arrays by the buffer protocol, everything else (torch) by
// DLPack. The view stays valid while the PyTensor lives. Only a PyDeviceTensor may lie on a GPU.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/tensor.h"
#include "dlpack.h"

namespace qn::python {

namespace py = pybind11;

struct PyTensor {
  TensorView view;
  py::object owner;
};

/// Where the arrays of a call lie.
struct OpDevice {
  bool on_gpu = false;
  void* stream = nullptr;  // the caller's, of a GPU
};

struct PyDeviceTensor : PyTensor {
  OpDevice device;
};

/// Opens the GPU that ops of arrays there run on, unless it is open.
void require_op_gpu();

inline DType dtype_from_dlpack(DLDataType type) {
  if (type.lanes == 1 && type.code == kDLFloat && type.bits == 32) return DType::F32;
  if (type.lanes == 1 && type.code == kDLBfloat && type.bits == 16) return DType::BF16;
  if (type.lanes == 1 && type.code == kDLInt && type.bits == 32) return DType::I32;
  if (type.lanes == 1 && type.code == kDLInt && type.bits == 8) return DType::I8;
  throw ArgumentError(join_message("[tensor] dtype is DLPack code ", int{type.code}, " with ",
                                   int{type.bits},
                                   " bits, expected float32, bfloat16, int32 or int8"));
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

inline PyTensor tensor_from_dlpack(const py::object& object, const OpDevice& device = {}) {
  PyTensor result;
  py::capsule capsule;
  if (device.on_gpu) {
    // The producer makes this stream wait for what it has queued elsewhere. DLPack calls the
    // default stream 1.
    const auto stream = reinterpret_cast<uintptr_t>(device.stream);
    capsule = object.attr("__dlpack__")(py::arg("stream") = stream == 0 ? uintptr_t{1} : stream);
  } else {
    capsule = object.attr("__dlpack__")();
  }
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  result.owner = capsule;  // an unconsumed capsule releases the tensor itself
  const DLTensor& tensor = managed->dl_tensor;
  QN_CHECK(tensor.device.device_type == (device.on_gpu ? kDLCuda : kDLCpu),
           "[tensor] is on DLPack's device type ", tensor.device.device_type, ", expected ",
           device.on_gpu ? "a CUDA GPU" : "the CPU, the only device that has this op");
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

inline OpDevice device_of(const py::object& object) {
  const auto device = object.attr("__dlpack_device__")().cast<std::pair<int32_t, int32_t>>();
  if (device.first != kDLCuda) return {};
  QN_CHECK(device.second == 0, "[tensor] is on GPU ", device.second, ", expected GPU 0");
  require_op_gpu();
  const py::object stream =
      py::module_::import("qwen_native.devices").attr("current_stream")(object);
  return {true, reinterpret_cast<void*>(stream.cast<uintptr_t>())};
}

inline PyTensor to_tensor(const py::object& object) {
  if (py::isinstance<py::array>(object)) return tensor_from_numpy(object.cast<py::array>());
  if (py::hasattr(object, "__dlpack__")) return tensor_from_dlpack(object);
  throw py::type_error("expected a numpy array or an object with __dlpack__, got " +
                       py::str(py::type::of(object)).cast<std::string>());
}

inline PyDeviceTensor to_device_tensor(const py::object& object) {
  if (py::isinstance<py::array>(object) || !py::hasattr(object, "__dlpack__"))
    return {to_tensor(object), {}};
  const OpDevice device = device_of(object);
  return {tensor_from_dlpack(object, device), device};
}

inline void meet(const OpDevice*& all, const OpDevice& device) {
  if (all == nullptr) all = &device;
  QN_CHECK(all->on_gpu == device.on_gpu, "[tensor] is on ", device.on_gpu ? "a GPU" : "the CPU",
           ", expected ", all->on_gpu ? "a GPU" : "the CPU", " as the other tensors");
}
inline void meet(const OpDevice*& all, const PyDeviceTensor& tensor) { meet(all, tensor.device); }
inline void meet(const OpDevice*& all, const std::optional<PyDeviceTensor>& tensor) {
  if (tensor) meet(all, *tensor);
}

/// Where all of these lie, with the stream of the first; throws ArgumentError when not together.
template <class... Tensors>
OpDevice common_device(const Tensors&... tensors) {
  const OpDevice* all = nullptr;
  (meet(all, tensors), ...);
  return *all;
}

}  // namespace qn::python

namespace pybind11::detail {

template <>
struct type_caster<qn::python::PyDeviceTensor> {
 public:
  PYBIND11_TYPE_CASTER(qn::python::PyDeviceTensor, const_name("Array"));
  bool load(handle source, bool) {
    value = qn::python::to_device_tensor(reinterpret_borrow<object>(source));
    return true;
  }
};

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
