// What the binding files share: the registration functions and the process-wide execution context
// of bare ops.
#pragma once
#include <pybind11/pybind11.h>

#include <mutex>
#include <string>

#include "core/context.h"
#include "core/dtype.h"

namespace qn::python {

void register_core(pybind11::module_& module);
void register_ops(pybind11::module_& module);
void register_runtime(pybind11::module_& module);
void register_engine(pybind11::module_& module);

/// Threads and scratch for ops called one by one from Python; engines have their own. The object
/// keeps other Python threads out, so it must live until the op returns.
class OpContext {
 public:
  OpContext();
  operator const ExecContext&() const { return context_; }

 private:
  std::unique_lock<std::mutex> lock_;
  ExecContext context_;
};

inline OpContext op_context() { return {}; }

/// The element type of a KV cache by its Python name.
DType kv_dtype(const std::string& name);

}  // namespace qn::python
