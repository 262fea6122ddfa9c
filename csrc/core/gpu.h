// A GPU: the library that drives it, one stream, and owners of its memory. The engine links to no
// CUDA library; it loads one at run time (gpu_rt.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "core/gpu_rt.h"

namespace qn {

/// Device 0 of a library; everything is queued on one stream, and freed memory is reused in its
/// order. Functions throw Error naming what failed and why.
class Gpu {
 public:
  /// Loads the library. Throws Error when it cannot be loaded, finds no GPU, or one older than
  /// sm_80.
  explicit Gpu(const std::string& library);
  virtual ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  /// GPUs that a library finds; 0 when it cannot be loaded.
  static int count(const std::string& library);

  GpuInfo info() const;
  void* stream() const { return stream_; }
  /// Waits for everything queued.
  void sync() const;
  /// Queues a copy between device memory and page-locked or device memory.
  void copy(void* to, const void* from, size_t bytes) const;
  /// Throws unless `error` is 0: `what` could not be done, and the library's reason.
  void check(int error, const char* what) const;

 protected:
  void* symbol(const char* name) const;

 private:
  friend class GpuBuffer;
  friend class PinnedBuffer;
  friend class GpuEvent;
  friend class GpuGraph;
  friend class GpuStreamScope;
  struct Table {
#define QN_GPU_MEMBER(name) decltype(&::qn_gpu_##name) name;
    QN_GPU_FUNCTIONS(QN_GPU_MEMBER)
#undef QN_GPU_MEMBER
  };

  std::string library_;
  void* handle_ = nullptr;
  Table call_{};
  void* stream_ = nullptr;
};

/// Lets a GPU queue on a stream of somebody else's while it lives.
class GpuStreamScope {
 public:
  GpuStreamScope(Gpu& gpu, void* stream) : gpu_(gpu), own_(std::exchange(gpu.stream_, stream)) {}
  ~GpuStreamScope() { gpu_.stream_ = own_; }
  GpuStreamScope(const GpuStreamScope&) = delete;
  GpuStreamScope& operator=(const GpuStreamScope&) = delete;

 private:
  Gpu& gpu_;
  void* own_;
};

/// Device memory; contents start uninitialised. The GPU must outlive it.
class GpuBuffer {
 public:
  GpuBuffer() = default;
  /// Throws Error with the bytes wanted and free when there is not enough memory.
  GpuBuffer(const Gpu& gpu, size_t bytes, const char* purpose);
  ~GpuBuffer();
  GpuBuffer(GpuBuffer&& other) noexcept { swap(other); }
  GpuBuffer& operator=(GpuBuffer&& other) noexcept {
    swap(other);
    return *this;
  }

  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void swap(GpuBuffer& other) {
    std::swap(gpu_, other.gpu_), std::swap(data_, other.data_), std::swap(size_, other.size_);
  }

  const Gpu* gpu_ = nullptr;
  void* data_ = nullptr;
  size_t size_ = 0;
};

/// A point in the stream that the host can wait for.
class GpuEvent {
 public:
  explicit GpuEvent(const Gpu& gpu);
  ~GpuEvent();
  GpuEvent(const GpuEvent&) = delete;
  GpuEvent& operator=(const GpuEvent&) = delete;

  void record();
  /// Waits for the last record(), if any.
  void sync();

 private:
  const Gpu& gpu_;
  void* event_ = nullptr;
};

/// Page-locked host memory, which copies are made from and to. It must not be changed before the
/// copies are done.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  PinnedBuffer(const Gpu& gpu, size_t bytes);
  ~PinnedBuffer();
  PinnedBuffer(PinnedBuffer&& other) noexcept { swap(other); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }

  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void swap(PinnedBuffer& other) {
    std::swap(gpu_, other.gpu_), std::swap(data_, other.data_), std::swap(size_, other.size_);
  }

  const Gpu* gpu_ = nullptr;
  void* data_ = nullptr;
  size_t size_ = 0;
};

/// The small inputs of one step: gathered in page-locked memory and sent with one copy. The same
/// sequence of sizes gives the same device addresses as long as generation() stays.
class GpuInputs {
 public:
  explicit GpuInputs(const Gpu& gpu) : gpu_(gpu), sent_(gpu) {}

  /// Starts anew, with room for `bytes`; waits until the last inputs have been copied.
  void begin(size_t bytes);
  /// Adds values; returns where they will be on the device, 16-byte aligned.
  template <typename T>
  T* put(const T* values, size_t count) {
    return static_cast<T*>(put_bytes(values, count * sizeof(T)));
  }
  /// Queues the copy of everything added.
  void send();
  int64_t generation() const { return generation_; }
  /// Bytes that put() takes for `bytes`.
  static constexpr size_t padded(size_t bytes) { return (bytes + 15) / 16 * 16; }

 private:
  void* put_bytes(const void* values, size_t bytes);

  const Gpu& gpu_;
  GpuBuffer device_;
  PinnedBuffer host_;
  GpuEvent sent_;
  size_t used_ = 0;
  int64_t generation_ = 0;
};

/// What was queued between construction and finish(), to be queued again as often as wanted with
/// the same arguments. Memory that it uses must stay where it is.
class GpuGraph {
 public:
  explicit GpuGraph(const Gpu& gpu);
  ~GpuGraph();
  GpuGraph(const GpuGraph&) = delete;
  GpuGraph& operator=(const GpuGraph&) = delete;

  void finish();
  void launch() const;

 private:
  const Gpu& gpu_;
  void* graph_ = nullptr;
  bool capturing_ = true;
};

}  // namespace qn
