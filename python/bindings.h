// What the binding files share: the registration functions and the process-wide execution context
// of bare ops.
#pragma once
#include <pybind11/pybind11.h>

#include "core/context.h"

namespace qn::python {

void register_core(pybind11::module_& module);
void register_ops(pybind11::module_& module);

/// Threads and scratch for ops called one by one from Python; engines have their own.
ExecContext op_context();

}  // namespace qn::python
