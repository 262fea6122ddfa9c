#include <pybind11/stl.h>

#include <memory>

#include "bindings.h"
#include "core/cpu_info.h"
#include "core/gpu.h"
#include "kernels/cpu/dispatch.h"
#include "ops/gpu.h"
#include "ops/probe.h"

namespace qn::python {

namespace py = pybind11;

namespace {

struct OpThreads {
  std::mutex mutex;
  std::unique_ptr<ThreadPool> pool;
  Workspace workspace;
  std::shared_ptr<Gpu> gpu;  // of arrays on a GPU; changed with the mutex held
};

OpThreads& op_threads() {
  static OpThreads instance{{}, std::make_unique<ThreadPool>(thread_budget().threads), {}, {}};
  return instance;
}

}  // namespace

OpContext::OpContext(const OpDevice& device)
    : lock_(op_threads().mutex),
      gpu_(device.on_gpu ? op_threads().gpu : nullptr),
      gpu_scratch_(gpu_.get()),
      context_{*op_threads().pool, gpu_ != nullptr ? gpu_scratch_ : op_threads().workspace,
               gpu_.get()} {
  if (gpu_ != nullptr)
    stream_.emplace(*gpu_, device.stream);
  else
    context_.workspace.reset();
}

void set_op_gpu(std::shared_ptr<Gpu> gpu) {
  py::gil_scoped_release unlocked;
  const std::lock_guard<std::mutex> lock(op_threads().mutex);
  op_threads().gpu = std::move(gpu);
}

void require_op_gpu() {
  {
    py::gil_scoped_release unlocked;
    const std::lock_guard<std::mutex> lock(op_threads().mutex);
    if (op_threads().gpu != nullptr) return;
  }
  const py::tuple opened = py::module_::import("qwen_native.devices").attr("open_device")("cuda");
  set_op_gpu(opened[1].cast<std::shared_ptr<Gpu>>());
}

void register_core(py::module_& module) {
  py::class_<Gpu, std::shared_ptr<Gpu>>(module, "Gpu")
      .def(py::init([](const std::string& library) {
             return std::const_pointer_cast<Gpu>(ops::open_gpu(library));
           }),
           py::arg("library"))
      .def_static("count", &Gpu::count, py::arg("library"))
      .def("info", [](const Gpu& gpu) {
        const GpuInfo info = gpu.info();
        py::dict result;
        result["name"] = info.name;
        result["capability"] = py::make_tuple(info.major, info.minor);
        result["multiprocessors"] = info.multiprocessors;
        result["free_bytes"] = info.free_bytes;
        result["total_bytes"] = info.total_bytes;
        return result;
      });
  module.def("set_op_gpu", &set_op_gpu, py::arg("gpu"));
  module.def("gpu_has_format", [](const std::string& format) {
    return ops::gpu_has_format(ops::weight_format_from_name(format));
  });
  module.def("gpu_kv_page_bytes", [](int64_t page_tokens, int64_t num_kv_heads, int64_t head_dim,
                                     const std::string& dtype) {
    return ops::gpu_kv_page_bytes(page_tokens, num_kv_heads, head_dim, kv_dtype(dtype));
  });
  module.def("host_isa", [] { return isa_name(host_isa()); });
  module.def("active_isa", [] { return isa_name(cpu::active_isa()); });
  module.def("set_isa", [](const std::string& name) { cpu::set_active_isa(isa_from_name(name)); });
  module.def("memory_streams", &memory_streams);
  module.def("set_memory_streams", &set_memory_streams, py::arg("count"));
  module.def("folded_tokens", &ops::folded_tokens);
  module.def("built_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : cpu::built_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  module.def("kernel_sources", [] {
    py::dict sources;
    for (const auto& [op, isa] : cpu::kernel_sources(cpu::active_isa()))
      sources[op.c_str()] = isa_name(isa);
    return sources;
  });
  module.def("thread_budget", [] {
    const ThreadBudget budget = thread_budget();
    py::dict result;
    result["affinity"] = budget.affinity;
    result["cores"] = budget.cores;
    result["quota"] = budget.quota;
    result["override"] = budget.override_value;
    result["threads"] = budget.threads;
    return result;
  });
  module.def("set_op_threads", [](int threads) {
    py::gil_scoped_release unlocked;
    std::lock_guard<std::mutex> lock(op_threads().mutex);
    op_threads().pool = std::make_unique<ThreadPool>(threads);
  });
  module.def("keep_heap", &keep_heap);
  module.def("op_threads", [] { return op_threads().pool->threads(); });
  module.def(
      "measure_peaks",
      [](int threads, size_t read_bytes) {
        ops::Peaks peaks;
        {
          py::gil_scoped_release unlocked;
          ThreadPool pool(threads);
          Workspace workspace;
          peaks = ops::measure_peaks(read_bytes, {pool, workspace});
        }
        py::dict result;
        result["isa"] = isa_name(cpu::active_isa());
        result["threads"] = threads;
        result["read_bytes"] = peaks.read_bytes;
        result["read_bandwidth"] = peaks.read_bandwidth;
        result["fma_f32"] = peaks.fma_f32;
        result["dot_int8"] = peaks.dot_int8;
        result["dot_bf16"] = peaks.dot_bf16;
        result["tile_int8"] = peaks.tile_int8;
        result["tile_bf16"] = peaks.tile_bf16;
        return result;
      },
      py::arg("threads"), py::arg("read_bytes") = 0);
}

}  // namespace qn::python
