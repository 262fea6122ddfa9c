// What the engine asks of a GPU's runtime: plain C functions, so that a library that offers them
// can be loaded at run time. kernels/cuda/cudart.cpp has them for real GPUs,
// kernels/cuda/simt/gpu_rt.cpp for the SIMT executor. Unless said otherwise they return 0 or an
// error for qn_gpu_error.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace qn {

struct GpuInfo {
  char name[256];
  int32_t major, minor;  // compute capability
  int32_t multiprocessors;
  uint64_t free_bytes, total_bytes;  // of memory
};

}  // namespace qn

#pragma GCC visibility push(default)
extern "C" {
/// 0 also where there is no driver.
int qn_gpu_device_count();
/// Of device 0.
int qn_gpu_info(qn::GpuInfo* info);
/// Why a call failed.
const char* qn_gpu_error(int error);

/// Device memory, uninitialised, 256-byte aligned; in the order of the stream.
int qn_gpu_alloc(void** pointer, size_t bytes, void* stream);
int qn_gpu_free(void* pointer, void* stream);
/// Page-locked host memory, the only kind that qn_gpu_copy takes.
int qn_gpu_alloc_host(void** pointer, size_t bytes);
int qn_gpu_free_host(void* pointer);
/// Queues a copy; each side is device memory or page-locked.
int qn_gpu_copy(void* to, const void* from, size_t bytes, void* stream);

int qn_gpu_stream_create(void** stream);
int qn_gpu_stream_destroy(void* stream);
/// Waits for all that has been queued.
int qn_gpu_stream_sync(void* stream);
int qn_gpu_event_create(void** event);
int qn_gpu_event_destroy(void* event);
int qn_gpu_event_record(void* event, void* stream);
/// Waits for what was queued before the event was recorded last.
int qn_gpu_event_sync(void* event);

/// Until capture_end, launches and copies are noted instead of queued; allocating or waiting
/// meanwhile is an error.
int qn_gpu_capture_begin(void* stream);
int qn_gpu_capture_end(void* stream, void** graph);
/// Queues everything that was noted, with the arguments of then.
int qn_gpu_graph_launch(void* graph, void* stream);
int qn_gpu_graph_destroy(void* graph);
}
#pragma GCC visibility pop

// clang-format off
/// The names above without their prefix, for a table.
#define QN_GPU_FUNCTIONS(X)                                                            \
  X(device_count) X(info) X(error) X(alloc) X(free) X(alloc_host) X(free_host) X(copy) \
  X(stream_create) X(stream_destroy) X(stream_sync) X(event_create) X(event_destroy)   \
  X(event_record) X(event_sync) X(capture_begin) X(capture_end) X(graph_launch)        \
  X(graph_destroy)
// clang-format on
