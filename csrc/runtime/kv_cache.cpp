#include "runtime/kv_cache.h"

#include <cstring>

namespace qn::rt {

KvMemory::KvMemory(int64_t pages, int64_t page_tokens, int64_t num_layers, int64_t num_kv_heads,
                   int64_t head_dim, DType dtype, const Gpu* gpu)
    : page_tokens_(page_tokens), gpu_(gpu) {
  const size_t layer_bytes =
      gpu == nullptr ? ops::kv_page_bytes(page_tokens, num_kv_heads, head_dim, dtype)
                     : ops::gpu_kv_page_bytes(page_tokens, num_kv_heads, head_dim, dtype);
  page_bytes_ = layer_bytes * static_cast<size_t>(num_layers);
  const size_t bytes = page_bytes_ * static_cast<size_t>(pages);
  if (gpu == nullptr)
    host_ = HostBuffer(bytes);
  else
    device_ = GpuBuffer(*gpu, bytes, "the KV cache");
  base_ = static_cast<char*>(gpu == nullptr ? host_.data() : device_.data());
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    layers_.push_back({base_ + static_cast<size_t>(layer) * layer_bytes,
                       static_cast<int64_t>(page_bytes_), page_tokens, num_kv_heads, head_dim,
                       dtype});
  }
}

void KvMemory::copy_page(int32_t to, int32_t from) {
  char* target = base_ + static_cast<size_t>(to) * page_bytes_;
  const char* source = base_ + static_cast<size_t>(from) * page_bytes_;
  if (gpu_ == nullptr)
    std::memcpy(target, source, page_bytes_);
  else
    gpu_->copy(target, source, page_bytes_);
}

}  // namespace qn::rt
