// The GPU's runtime (core/gpu_rt.h) by the CUDA runtime, which is linked statically and loads the
// driver when it is first needed.
#include <cuda_runtime.h>

#include <cstdio>

#include "core/gpu_rt.h"

namespace {

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

/// Also forgets an error that is not fatal, so that a later launch does not report it.
int result(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

}  // namespace

extern "C" {

int qn_gpu_device_count() {
  int count = 0;
  return result(cudaGetDeviceCount(&count)) == 0 ? count : 0;
}

int qn_gpu_info(qn::GpuInfo* info) {
  *info = {};
  cudaDeviceProp properties;
  if (const int error = result(cudaGetDeviceProperties(&properties, 0))) return error;
  std::snprintf(info->name, sizeof info->name, "%s", properties.name);
  info->major = properties.major;
  info->minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  size_t free_bytes = 0, total_bytes = 0;
  const int error = result(cudaMemGetInfo(&free_bytes, &total_bytes));
  info->free_bytes = free_bytes;
  info->total_bytes = total_bytes;
  return error;
}

const char* qn_gpu_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int qn_gpu_alloc(void** pointer, size_t bytes, void* stream) {
  return result(cudaMallocAsync(pointer, bytes, stream_of(stream)));
}

int qn_gpu_free(void* pointer, void* stream) {
  return result(cudaFreeAsync(pointer, stream_of(stream)));
}

int qn_gpu_alloc_host(void** pointer, size_t bytes) {
  return result(cudaMallocHost(pointer, bytes));
}

int qn_gpu_free_host(void* pointer) { return result(cudaFreeHost(pointer)); }

int qn_gpu_copy(void* to, const void* from, size_t bytes, void* stream) {
  return result(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(stream)));
}

int qn_gpu_stream_create(void** stream) {
  return result(
      cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t*>(stream), cudaStreamNonBlocking));
}

int qn_gpu_stream_destroy(void* stream) { return result(cudaStreamDestroy(stream_of(stream))); }

int qn_gpu_stream_sync(void* stream) { return result(cudaStreamSynchronize(stream_of(stream))); }

int qn_gpu_event_create(void** event) {
  return result(
      cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t*>(event), cudaEventDisableTiming));
}

int qn_gpu_event_destroy(void* event) {
  return result(cudaEventDestroy(static_cast<cudaEvent_t>(event)));
}

int qn_gpu_event_record(void* event, void* stream) {
  return result(cudaEventRecord(static_cast<cudaEvent_t>(event), stream_of(stream)));
}

int qn_gpu_event_sync(void* event) {
  return result(cudaEventSynchronize(static_cast<cudaEvent_t>(event)));
}

int qn_gpu_capture_begin(void* stream) {
  return result(cudaStreamBeginCapture(stream_of(stream), cudaStreamCaptureModeThreadLocal));
}

int qn_gpu_capture_end(void* stream, void** graph) {
  cudaGraph_t captured = nullptr;
  if (const int error = result(cudaStreamEndCapture(stream_of(stream), &captured))) return error;
  const int error =
      result(cudaGraphInstantiateWithFlags(reinterpret_cast<cudaGraphExec_t*>(graph), captured, 0));
  cudaGraphDestroy(captured);
  return error;
}

int qn_gpu_graph_launch(void* graph, void* stream) {
  return result(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), stream_of(stream)));
}

int qn_gpu_graph_destroy(void* graph) {
  return result(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)));
}

}  // extern "C"
