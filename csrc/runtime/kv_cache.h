// The memory of the paged KV cache; page_pool.h says which pages are in use.
#pragma once
#include <cstdint>
#include <vector>

#include "core/allocator.h"
#include "ops/gpu.h"

namespace qn::rt {

/// Memory of all pages and layers, reserved at once and, on the host, committed as pages are first
/// written. A page holds all layers, so that a growing sequence touches contiguous memory.
class KvMemory {
 public:
  KvMemory(int64_t pages, int64_t page_tokens, int64_t num_layers, int64_t num_kv_heads,
           int64_t head_dim, DType dtype, const Gpu* gpu = nullptr);

  const std::vector<ops::KvLayer>& layers() const { return layers_; }
  int64_t page_tokens() const { return page_tokens_; }
  size_t page_bytes() const { return page_bytes_; }
  void copy_page(int32_t to, int32_t from);

 private:
  int64_t page_tokens_;
  size_t page_bytes_;
  const Gpu* gpu_;
  HostBuffer host_;
  GpuBuffer device_;
  char* base_;
  std::vector<ops::KvLayer> layers_;
};

}  // namespace qn::rt
