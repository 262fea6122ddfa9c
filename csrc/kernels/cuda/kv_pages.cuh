// Where keys and values lie in the paged cache (KvPages in kernels.h).
#pragma once
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {

/// One kv head within one page.
struct KvHead {
  char* keys;
  int64_t value_offset;  // bytes from a key row to the value row of its token
  int64_t scale_offset;  // bytes from `keys` to the key scales
};

QN_HD constexpr int64_t kv_row_bytes(const KvPages& kv) { return kv.head_dim * (kv.bits / 8); }

QN_HD constexpr int64_t kv_head_bytes(const KvPages& kv) {
  return (2 * kv_row_bytes(kv) + (kv.bits == 8 ? 8 : 0)) << kv.page_shift;
}

QN_DEV KvHead kv_head(const KvPages& kv, int64_t page, int64_t head) {
  const int64_t rows = kv_row_bytes(kv) << kv.page_shift;
  char* keys = static_cast<char*>(kv.base) + page * kv.page_stride + head * kv_head_bytes(kv);
  return KvHead{keys, rows, 2 * rows};
}

}  // namespace qn::cuda
