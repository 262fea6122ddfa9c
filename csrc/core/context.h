// What an op needs besides its tensors: threads and scratch memory, or a GPU.
#pragma once
#include "core/allocator.h"
#include "core/dtype.h"
#include "core/parallel.h"

namespace qn {

class Gpu;

struct ExecContext {
  ThreadPool& pool;
  Workspace& workspace;      // in the GPU's memory when there is one
  const Gpu* gpu = nullptr;  // where tensors, weights and the KV cache lie; null: host memory

  /// Of what one op hands to the next.
  DType activation_dtype() const { return gpu == nullptr ? DType::F32 : DType::BF16; }
};

}  // namespace qn
