// What the binding files share: the registration functions and the process-wide execution context
// of bare ops.
#pragma once
#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "core/context.h"
#include "core/dtype.h"
#include "core/gpu.h"
#include "tensor_caster.h"

namespace qn::python {

void register_core(pybind11::module_& module);
void register_ops(pybind11::module_& module);
void register_runtime(pybind11::module_& module);
void register_engine(pybind11::module_& module);

/// Threads and scratch for ops called one by one from Python; engines have their own. The object
/// keeps other Python threads out, so it must live until the op returns.
class OpContext {
 public:
  OpContext() : OpContext(OpDevice{}) {}
  /// On a GPU: on the caller's stream, with scratch memory that is taken and given back in its
  /// order.
  explicit OpContext(const OpDevice& device);
  operator const ExecContext&() const { return context_; }

 private:
  std::unique_lock<std::mutex> lock_;
  std::shared_ptr<Gpu> gpu_;
  std::optional<GpuStreamScope> stream_;
  Workspace gpu_scratch_;
  ExecContext context_;
};

inline OpContext op_context() { return {}; }
inline OpContext op_context(const OpDevice& device) { return OpContext(device); }

/// The element type of a KV cache by its Python name.
DType kv_dtype(const std::string& name);

}  // namespace qn::python
