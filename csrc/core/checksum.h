// The checksum of packed model files (docs/PACKED_FILE.md).
#pragma once
#include <cstddef>
#include <cstdint>

namespace qn {

/// 64-bit checksum of `size` bytes, the same on every machine. It finds every change of a single
/// 64-bit word and, but for a chance of about 2^-64, every other accident; it is no protection
/// against somebody who chooses the bytes. About as fast as one core reads memory.
uint64_t checksum(const void* data, size_t size);

}  // namespace qn
