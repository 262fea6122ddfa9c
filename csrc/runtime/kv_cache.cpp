#include "runtime/kv_cache.h"

#include <cstring>

namespace qn::rt {

KvMemory::KvMemory(int64_t pages, int64_t page_tokens, int64_t num_layers, int64_t num_kv_heads,
                   int64_t head_dim, DType dtype)
    : page_tokens_(page_tokens) {
  const size_t layer_bytes = ops::kv_page_bytes(page_tokens, num_kv_heads, head_dim, dtype);
  page_bytes_ = layer_bytes * static_cast<size_t>(num_layers);
  memory_ = HostBuffer(page_bytes_ * static_cast<size_t>(pages));
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    layers_.push_back(
        {static_cast<char*>(memory_.data()) + static_cast<size_t>(layer) * layer_bytes,
         static_cast<int64_t>(page_bytes_), page_tokens, num_kv_heads, head_dim, dtype});
  }
}

void KvMemory::copy_page(int32_t to, int32_t from) {
  char* base = static_cast<char*>(memory_.data());
  std::memcpy(base + static_cast<size_t>(to) * page_bytes_,
              base + static_cast<size_t>(from) * page_bytes_, page_bytes_);
}

}  // namespace qn::rt
