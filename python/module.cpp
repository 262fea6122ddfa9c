#include "bindings.h"
#include "core/error.h"
#include "packed_weight.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.attr("__version__") = QN_VERSION;
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const qn::ArgumentError& error) {
      py::set_error(PyExc_ValueError, error.what());
    } catch (const qn::Error& error) {
      py::set_error(PyExc_RuntimeError, error.what());
    }
  });
  qn::python::register_core(module);
  qn::python::register_ops(module);
  qn::python::register_runtime(module);
  qn::python::register_weights(module);
  qn::python::register_engine(module);
}
