#include <pybind11/numpy.h>

#include <cstring>
#include <memory>
#include <string>

#include "bindings.h"
#include "core/checksum.h"
#include "core/error.h"
#include "ops/gpu.h"
#include "packed_weight.h"

namespace qn::python {

namespace py = pybind11;

namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;

void check_bytes(const char* op, const Bytes& data, size_t expected, const std::string& what) {
  QN_CHECK(static_cast<size_t>(data.nbytes()) == expected, "[", op, "] data has ", data.nbytes(),
           " bytes, expected ", expected, " for ", what);
}

std::string describe(const std::string& type, int64_t rows, int64_t cols) {
  return join_message(type, "[", rows, ", ", cols, "]");
}

std::unique_ptr<PackedWeight> from_bytes(const Bytes& data, const std::string& format, int64_t rows,
                                         int64_t cols) {
  auto weight = std::make_unique<PackedWeight>(ops::weight_format_from_name(format), rows, cols);
  check_bytes("weight", data, weight->buffer.size(), describe(format, rows, cols));
  if (data.nbytes() > 0) std::memcpy(weight->buffer.data(), data.data(), weight->buffer.size());
  return weight;
}

std::unique_ptr<PackedWeight> pack(const Bytes& data, const std::string& source, int64_t rows,
                                   int64_t cols, const std::string& format) {
  const SourceType type = ops::source_type_from_name(source);
  check_bytes("pack_weight", data, ops::source_bytes(type, rows, cols),
              describe(source, rows, cols));
  auto weight = std::make_unique<PackedWeight>(ops::weight_format_from_name(format), rows, cols);
  const void* bytes = data.data();
  py::gil_scoped_release unlocked;
  ops::pack_weight(weight->buffer.data(), weight->view.format, rows, cols, type, bytes,
                   op_context());
  return weight;
}

py::array_t<float> decode(const Bytes& data, const std::string& source, int64_t rows,
                          int64_t cols) {
  const SourceType type = ops::source_type_from_name(source);
  check_bytes("decode_source", data, ops::source_bytes(type, rows, cols),
              describe(source, rows, cols));
  py::array_t<float> out({rows, cols});
  float* to = out.mutable_data();
  const void* bytes = data.data();
  py::gil_scoped_release unlocked;
  ops::decode_source(to, rows, cols, type, bytes, op_context());
  return out;
}

py::array_t<float> unpack(const PackedWeight& weight) {
  py::array_t<float> out({weight.view.rows, weight.view.cols});
  float* to = out.mutable_data();
  py::gil_scoped_release unlocked;
  ops::unpack_weight(to, weight.view, op_context());
  return out;
}

const PyDeviceTensor& check_words(const char* name, const PyDeviceTensor& words, size_t bytes) {
  QN_CHECK(words.device.on_gpu && words.view.dtype == DType::I32 && words.view.rank == 1 &&
               words.view.contiguous() && static_cast<size_t>(words.view.shape[0]) * 4 == bytes,
           "[gpu_weight] ", name, " is ", words.view.describe(),
           words.device.on_gpu ? " on a GPU" : " on the CPU", ", expected dense i32[", bytes / 4,
           "] on a GPU");
  return words;
}

/// Queues the rearrangement of the bytes of a PackedWeight, which lie on the GPU, to `data`.
std::unique_ptr<GpuWeight> gpu_weight(const py::object& data, const py::object& packed,
                                      const std::string& format_name, int64_t rows, int64_t cols) {
  const WeightFormat format = ops::weight_format_from_name(format_name);
  QN_CHECK(is_quantized(format), "[gpu_weight] format is ", format_name,
           ", expected int8, int8_grouped or int4_symmetric");
  const PyDeviceTensor to = to_device_tensor(data), from = to_device_tensor(packed);
  check_words("data", to, ops::gpu_weight_bytes(format, rows, cols));
  check_words("packed", from, ops::weight_bytes(format, rows, cols));
  auto weight =
      std::make_unique<GpuWeight>(GpuWeight{to, data, {to.view.data, format, rows, cols, cols}});
  py::gil_scoped_release unlocked;
  const OpContext context(common_device(to, from));
  ops::repack_weight(weight->view, 0, rows, from.view.data,
                     *static_cast<const ExecContext&>(context).gpu);
  return weight;
}

}  // namespace

void register_weights(py::module_& module) {
  py::class_<PackedWeight>(module, "PackedWeight", py::buffer_protocol())
      .def(py::init(&from_bytes), py::arg("data").noconvert(), py::arg("format"), py::arg("rows"),
           py::arg("cols"))
      .def_property_readonly(
          "format", [](const PackedWeight& w) { return ops::weight_format_name(w.view.format); })
      .def_property_readonly(
          "shape", [](const PackedWeight& w) { return py::make_tuple(w.view.rows, w.view.cols); })
      .def_property_readonly("rows", [](const PackedWeight& w) { return w.view.rows; })
      .def_property_readonly("cols", [](const PackedWeight& w) { return w.view.cols; })
      .def_property_readonly("data",
                             [](const py::object& self) { return py::array(py::memoryview(self)); })
      .def_property_readonly("nbytes", [](const PackedWeight& w) { return w.buffer.size(); })
      .def_buffer([](PackedWeight& w) {
        return py::buffer_info(static_cast<uint8_t*>(w.buffer.data()),
                               static_cast<py::ssize_t>(w.buffer.size()), true);
      });
  py::class_<GpuWeight>(module, "GpuWeight")
      .def_property_readonly(
          "format", [](const GpuWeight& w) { return ops::weight_format_name(w.view.format); })
      .def_property_readonly(
          "shape", [](const GpuWeight& w) { return py::make_tuple(w.view.rows, w.view.cols); })
      .def_property_readonly("data", [](const GpuWeight& w) { return w.array; });
  module.def("gpu_weight", &gpu_weight);
  module.def("gpu_weight_bytes", [](const std::string& format, int64_t rows, int64_t cols) {
    return ops::gpu_weight_bytes(ops::weight_format_from_name(format), rows, cols);
  });
  module.def("pack_weight", &pack, py::arg("data").noconvert(), py::arg("source"), py::arg("rows"),
             py::arg("cols"), py::arg("format"));
  module.def("decode_source", &decode, py::arg("data").noconvert(), py::arg("source"),
             py::arg("rows"), py::arg("cols"));
  module.def("unpack_weight", &unpack);
  module.def("weight_bytes", [](const std::string& format, int64_t rows, int64_t cols) {
    return ops::weight_bytes(ops::weight_format_from_name(format), rows, cols);
  });
  module.def(
      "checksum",
      [](const Bytes& data) {
        const void* bytes = data.data();
        const size_t size = static_cast<size_t>(data.nbytes());
        py::gil_scoped_release unlocked;
        return checksum(bytes, size);
      },
      py::arg("data").noconvert());
}

}  // namespace qn::python
