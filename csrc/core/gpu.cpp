#include "core/gpu.h"

#include <dlfcn.h>

#include <cstring>

#include "core/error.h"

namespace qn {
namespace {

constexpr int kOldestMajor = 8;  // sm_80: cp.async and the mma that the kernels use

void* load(const std::string& library) { return dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL); }

}  // namespace

Gpu::Gpu(const std::string& library) : library_(library), handle_(load(library)) {
  if (handle_ == nullptr) QN_FAIL("[gpu] ", library, " cannot be loaded: ", dlerror());
#define QN_GPU_LOAD(name) \
  call_.name = reinterpret_cast<decltype(call_.name)>(symbol("qn_gpu_" #name));
  QN_GPU_FUNCTIONS(QN_GPU_LOAD)
#undef QN_GPU_LOAD
  if (call_.device_count() == 0)
    QN_FAIL("[gpu] no GPU was found, expected one of NVIDIA's and its driver");
  const GpuInfo found = info();
  if (found.major < kOldestMajor) {
    QN_FAIL("[gpu] ", found.name, " has compute capability ", found.major, ".", found.minor,
            ", expected at least ", kOldestMajor, ".0");
  }
  check(call_.stream_create(&stream_), "make a stream");
}

// The library stays loaded: CUDA's runtime does not survive dlclose.
Gpu::~Gpu() {
  if (stream_ != nullptr) call_.stream_destroy(stream_);
}

int Gpu::count(const std::string& library) {
  void* handle = load(library);
  if (handle == nullptr) return 0;
  const auto device_count =
      reinterpret_cast<decltype(&qn_gpu_device_count)>(dlsym(handle, "qn_gpu_device_count"));
  return device_count == nullptr ? 0 : device_count();
}

void* Gpu::symbol(const char* name) const {
  void* address = dlsym(handle_, name);
  if (address == nullptr)
    QN_FAIL("[gpu] ", library_, " has no ", name, ", expected one of this version");
  return address;
}

void Gpu::check(int error, const char* what) const {
  if (error != 0) QN_FAIL("[gpu] cannot ", what, ": ", call_.error(error));
}

GpuInfo Gpu::info() const {
  GpuInfo result{};
  check(call_.info(&result), "read the properties of the GPU");
  return result;
}

void Gpu::sync() const { check(call_.stream_sync(stream_), "run the kernels"); }

void Gpu::copy(void* to, const void* from, size_t bytes) const {
  if (bytes > 0) check(call_.copy(to, from, bytes, stream_), "copy");
}

GpuBuffer::GpuBuffer(const Gpu& gpu, size_t bytes, const char* purpose) : gpu_(&gpu), size_(bytes) {
  if (bytes == 0) return;
  const int error = gpu.call_.alloc(&data_, bytes, gpu.stream_);
  if (error == 0) return;
  data_ = nullptr;
  const GpuInfo info = gpu.info();
  QN_FAIL("[gpu] ", purpose, " takes ", bytes, " bytes, but ", info.free_bytes, " of the ",
          info.total_bytes, " bytes of ", info.name, " are free (", gpu.call_.error(error), ")");
}

GpuBuffer::~GpuBuffer() {
  if (data_ != nullptr) gpu_->call_.free(data_, gpu_->stream_);
}

GpuEvent::GpuEvent(const Gpu& gpu) : gpu_(gpu) {
  gpu.check(gpu.call_.event_create(&event_), "make an event");
}

GpuEvent::~GpuEvent() { gpu_.call_.event_destroy(event_); }

void GpuEvent::record() { gpu_.check(gpu_.call_.event_record(event_, gpu_.stream_), "record"); }

void GpuEvent::sync() { gpu_.check(gpu_.call_.event_sync(event_), "run the kernels"); }

PinnedBuffer::PinnedBuffer(const Gpu& gpu, size_t bytes) : gpu_(&gpu), size_(bytes) {
  if (bytes > 0) gpu.check(gpu.call_.alloc_host(&data_, bytes), "allocate page-locked memory");
}

PinnedBuffer::~PinnedBuffer() {
  if (data_ == nullptr) return;
  gpu_->call_.stream_sync(gpu_->stream_);  // copies may be under way
  gpu_->call_.free_host(data_);
}

void GpuInputs::begin(size_t bytes) {
  sent_.sync();
  used_ = 0;
  if (bytes <= host_.size()) return;
  host_ = {};
  host_ = PinnedBuffer(gpu_, 2 * bytes);
  device_ = {};
  device_ = GpuBuffer(gpu_, 2 * bytes, "a step's inputs");
  ++generation_;
}

void* GpuInputs::put_bytes(const void* values, size_t bytes) {
  QN_CHECK(used_ + padded(bytes) <= host_.size(), "[gpu] a step's inputs take more than the ",
           host_.size(), " bytes that were announced");
  if (bytes > 0) std::memcpy(static_cast<char*>(host_.data()) + used_, values, bytes);
  void* result = static_cast<char*>(device_.data()) + used_;
  used_ += padded(bytes);
  return result;
}

void GpuInputs::send() {
  gpu_.copy(device_.data(), host_.data(), used_);
  sent_.record();
}

GpuGraph::GpuGraph(const Gpu& gpu) : gpu_(gpu) {
  gpu.check(gpu.call_.capture_begin(gpu.stream_), "begin a graph");
}

GpuGraph::~GpuGraph() {
  if (capturing_) gpu_.call_.capture_end(gpu_.stream_, &graph_);
  if (graph_ != nullptr) gpu_.call_.graph_destroy(graph_);
}

void GpuGraph::finish() {
  capturing_ = false;
  gpu_.check(gpu_.call_.capture_end(gpu_.stream_, &graph_), "make a graph");
}

void GpuGraph::launch() const {
  gpu_.check(gpu_.call_.graph_launch(graph_, gpu_.stream_), "launch a graph");
}

}  // namespace qn
