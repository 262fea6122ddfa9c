// Simulated device memory: buffers of global memory.
#pragma once
#include <stddef.h>

namespace qn::simt {

/// Uninitialised (NaN) global memory, 256-byte aligned. An inaccessible page follows it closely.
/// Throws std::bad_alloc.
void* allocate(size_t bytes);
/// False when `pointer` is not the start of a live buffer.
bool release(void* pointer);
/// Marks bytes as written by the host. False when they are not within one live buffer.
bool mark_initialised(const void* pointer, size_t bytes);
/// Whether the bytes lie within one live buffer.
bool in_buffer(const void* pointer, size_t bytes);

}  // namespace qn::simt
