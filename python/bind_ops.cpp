#include <optional>

#include <pybind11/stl.h>

#include "bindings.h"
#include "ops/ops.h"
#include "tensor_caster.h"
#include "weight_caster.h"

namespace qn::python {

namespace py = pybind11;

namespace {

struct PySegment {
  PyTensor weight;  // [rows, cols] f32 | bf16, dense rows
  std::optional<PyTensor> bias;
  int64_t out_offset;
};

WeightView weight_view(const TensorView& weight) {
  QN_CHECK(weight.rank == 2 && (weight.dtype == DType::F32 || weight.dtype == DType::BF16),
           "[linear] weight is ", weight.describe(), ", expected [rows, cols] in f32 or bf16");
  QN_CHECK(weight.shape[1] <= 1 || weight.stride[1] == 1, "[linear] weight has stride ",
           weight.stride[1], " along its last axis, expected 1");
  return {weight.data, weight.dtype == DType::F32 ? WeightFormat::F32 : WeightFormat::BF16,
          weight.shape[0], weight.shape[1], weight.stride[0]};
}

ops::LinearSegment linear_segment(const PySegment& segment) {
  ops::LinearSegment result{weight_view(segment.weight.view), nullptr, segment.out_offset};
  if (segment.bias) {
    const TensorView& bias = segment.bias->view;
    QN_CHECK(bias.rank == 1 && bias.dtype == DType::F32 && bias.contiguous() &&
                 bias.shape[0] == result.weight.rows,
             "[linear] bias is ", bias.describe(), ", expected f32[", result.weight.rows,
             "], dense");
    result.bias = bias.as<float>();
  }
  return result;
}

}  // namespace

void register_ops(py::module_& module) {
  module.def("rms_norm", [](const PyTensor& out, const PyTensor& x, const PyTensor& weight,
                            float eps, const std::optional<PyTensor>& residual) {
    py::gil_scoped_release unlocked;
    ops::rms_norm(out.view, x.view, weight.view, eps, residual ? &residual->view : nullptr,
                  op_context());
  });

  py::class_<PySegment>(module, "LinearSegment")
      .def(py::init([](const PyTensor& weight, const std::optional<PyTensor>& bias,
                       int64_t out_offset) { return PySegment{weight, bias, out_offset}; }));
  module.def("linear", [](const PyTensor& out, const PyTensor& x,
                          const std::vector<PySegment>& segments, bool add, bool invariant) {
    py::gil_scoped_release unlocked;
    std::vector<ops::LinearSegment> native;
    for (const PySegment& segment : segments) native.push_back(linear_segment(segment));
    ops::linear(out.view, x.view, native, add ? ops::Epilogue::Add : ops::Epilogue::Store,
                invariant, op_context());
  });
  module.def("rope", [](const PyTensor& x, const PyTensor& cos, const PyTensor& sin) {
    py::gil_scoped_release unlocked;
    ops::rope(x.view, cos.view, sin.view, op_context());
  });
  module.def("swiglu", [](const PyTensor& out, const PyTensor& gate, const PyTensor& up) {
    py::gil_scoped_release unlocked;
    ops::swiglu(out.view, gate.view, up.view, op_context());
  });
  module.def("gather", [](const PyTensor& out, const PyTensor& ids, const PyWeight& table) {
    py::gil_scoped_release unlocked;
    ops::gather(out.view, ids.view, table.view, op_context());
  });
  module.def("argmax", [](const PyTensor& x) {
    py::gil_scoped_release unlocked;
    return ops::argmax(x.view, op_context());
  });
  module.def("log_sum_exp", [](const PyTensor& x) {
    py::gil_scoped_release unlocked;
    return ops::log_sum_exp(x.view, op_context());
  });
}

}  // namespace qn::python
