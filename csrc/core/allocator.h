// Host memory: page-backed buffers (huge pages when large); and a bump allocator for scratch, of
// the host or of a GPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/gpu.h"

namespace qn {

/// Anonymous, zero-filled memory straight from the kernel. Buffers of 2 MB and more are 2 MB
/// aligned and ask for transparent huge pages, which the weight-streaming kernels need to reach the
/// memory's bandwidth. Pages are committed on first touch, so a large reservation costs nothing
/// until it is used.
class HostBuffer {
 public:
  HostBuffer() = default;
  explicit HostBuffer(size_t bytes, bool huge_pages = true);
  ~HostBuffer();
  HostBuffer(HostBuffer&& other) noexcept;
  HostBuffer& operator=(HostBuffer&& other) noexcept;

  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
  void* mapping_ = nullptr;
  size_t mapping_size_ = 0;
};

/// Makes malloc keep what it has got, for the rest of the process: blocks of any size come from one
/// heap on huge pages and are used again, where otherwise each large one would be mapped, zeroed
/// page by page and unmapped every time. `reserve` is how far the heap may grow on huge pages; what
/// is never touched costs nothing. Returns false where the system or its malloc does not let us.
bool keep_heap(size_t reserve);

/// Scratch memory of one forward step: allocations are 64-byte aligned and all released by reset(),
/// which also merges the chunks so that a steady state allocates nothing.
class Workspace {
 public:
  Workspace() = default;
  /// Of the host when `gpu` is null.
  explicit Workspace(const Gpu* gpu) : gpu_(gpu) {}

  void* allocate(size_t bytes);
  template <typename T>
  T* allocate_array(int64_t count) {
    return static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)));
  }
  void reset();
  /// Changes whenever addresses that were given out before may not be given out again after a
  /// reset(): the same allocations lead to the same addresses as long as it stays.
  int64_t generation() const { return generation_; }

  /// Releases everything allocated since construction when it goes out of scope.
  class Scope {
   public:
    explicit Scope(Workspace& workspace);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Workspace& workspace_;
    size_t chunk_;
    size_t used_;
  };

 private:
  struct Chunk {
    HostBuffer host;
    GpuBuffer device;

    char* data() const { return static_cast<char*>(host.size() ? host.data() : device.data()); }
    size_t size() const { return host.size() + device.size(); }
  };
  void add_chunk(size_t bytes);

  const Gpu* gpu_ = nullptr;
  std::vector<Chunk> chunks_;
  int64_t generation_ = 0;
  size_t chunk_ = 0;  // index of the chunk in use
  size_t used_ = 0;   // bytes used in it
};

}  // namespace qn
