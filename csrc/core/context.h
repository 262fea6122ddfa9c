// What an op needs besides its tensors: threads and scratch memory.
#pragma once
#include "core/allocator.h"
#include "core/parallel.h"

namespace qn {

struct ExecContext {
  ThreadPool& pool;
  Workspace& workspace;
};

}  // namespace qn
