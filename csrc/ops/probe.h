// Measured ceilings of the machine, which benchmarks report their results against.
#pragma once
#include <cstddef>

#include "core/context.h"

namespace qn::ops {

/// Peaks of the active level with the pool's threads; 0 for an instruction that the level does not
/// have. One multiply-add counts as two operations.
struct Peaks {
  double read_bandwidth;  // bytes per second
  double fma_f32;         // operations per second
  double dot_int8;        // vector instructions: vpdpbusd, or what the level has instead
  double dot_bf16;        // vdpbf16ps
  double tile_int8;       // AMX
  double tile_bf16;       // AMX
  size_t read_bytes;      // size of the buffer that was read
};

/// Best of several passes, about a second in total. The read probe walks a buffer of `read_bytes`;
/// 0 means four times the last-level cache, within 256 MiB to 1 GiB.
Peaks measure_peaks(size_t read_bytes, const ExecContext& context);

}  // namespace qn::ops
