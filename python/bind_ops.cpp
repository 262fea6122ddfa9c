#include <optional>

#include <pybind11/stl.h>

#include "bindings.h"
#include "ops/ops.h"
#include "tensor_caster.h"

namespace qn::python {

namespace py = pybind11;

void register_ops(py::module_& module) {
  module.def("rms_norm", [](const PyTensor& out, const PyTensor& x, const PyTensor& weight,
                            float eps, const std::optional<PyTensor>& residual) {
    py::gil_scoped_release unlocked;
    ops::rms_norm(out.view, x.view, weight.view, eps, residual ? &residual->view : nullptr,
                  op_context());
  });
}

}  // namespace qn::python
