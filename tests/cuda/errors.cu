// Kernels with deliberate errors, and their correct counterparts, for tests/cuda/test_executor.py.
// A comment "expect: KIND" marks the line on which the executor must report that kind of error; a
// kernel must give exactly the reports that it marks. `data` has 4096 ints, all initialised but the
// last 64, and ends exactly there.
#include "kernels/cuda/ptx.cuh"

using namespace qn::cuda;

namespace {

struct Shared {
  int a[128];
  int b[32];
};
constexpr int kInts = 4096, kUninitialised = kInts - 64;

}  // namespace

// A kernel and its launcher of the same name.
#define KERNEL(name, blocks, threads)                                                        \
  static __global__ void name##_kernel(int* data);                                           \
  extern "C" [[gnu::visibility("default")]] int name(int* data, cudaStream_t stream) {       \
    return launch(#name, name##_kernel, dim3(blocks), dim3(threads), sizeof(Shared), stream, \
                  data);                                                                     \
  }                                                                                          \
  static __global__ void name##_kernel([[maybe_unused]] int* data)

// clang-format off: an error and its mark share a line

// ---- global memory

KERNEL(global_bounds_end, 1, 32) {
  data[kInts - 31 + threadIdx.x] = 1;  // expect: global-out-of-bounds
}
KERNEL(global_bounds_start, 1, 32) {
  data[static_cast<int>(threadIdx.x) - 1] = 1;  // expect: global-out-of-bounds
}
KERNEL(global_bounds_legal, 1, 32) { data[kInts - 32 + threadIdx.x] = 1; }

KERNEL(global_bounds_vector, 1, 1) {
  st16(data + kInts - 4, uint4{0, 0, 0, 0});
  st16(data + kInts, uint4{0, 0, 0, 0});  // expect: global-out-of-bounds
}
KERNEL(global_misaligned, 1, 32) {
  st16(data + threadIdx.x * 4 + 2, uint4{0, 0, 0, 0});  // expect: misaligned-access
}
KERNEL(global_misaligned_pair, 1, 1) {
  const uint2 v = ld8(data + 1);  // expect: misaligned-access
  data[0] = static_cast<int>(v.x);
}
KERNEL(global_aligned_legal, 1, 32) { st16(data + threadIdx.x * 4, uint4{0, 0, 0, 0}); }

KERNEL(global_uninitialised, 1, 32) {
  data[threadIdx.x] = data[kUninitialised - 16 + threadIdx.x];  // expect: global-uninitialised-read
}
KERNEL(global_initialised_by_kernel_legal, 1, 32) {
  data[kUninitialised + threadIdx.x] = 1;
  data[threadIdx.x] = data[kUninitialised + threadIdx.x];
}

KERNEL(global_race_in_block, 1, 64) {
  data[threadIdx.x] = 1;  // expect: global-race
  data[64 + threadIdx.x] = data[threadIdx.x ^ 32];  // expect: global-race
}
KERNEL(global_race_in_block_legal, 1, 64) {
  data[threadIdx.x] = 1;
  __syncthreads();
  data[64 + threadIdx.x] = data[threadIdx.x ^ 32];
}
KERNEL(global_write_after_read, 1, 64) {
  const int v = data[threadIdx.x ^ 32];  // expect: global-race
  data[threadIdx.x] = v;  // expect: global-race
}
KERNEL(global_write_after_broadcast, 1, 64) {
  const int v = data[0];
  if (threadIdx.x == 63) data[0] = v + 1;  // expect: global-race
}
KERNEL(global_write_after_broadcast_legal, 1, 64) {
  const int v = data[0];
  __syncthreads();
  if (threadIdx.x == 63) data[0] = v + 1;
}
KERNEL(global_same_word_by_two_threads, 1, 64) {
  data[threadIdx.x % 32] = 1;  // expect: global-race
}

KERNEL(blocks_write_same_word, 2, 32) {
  data[threadIdx.x] = 1;  // expect: global-race-between-blocks
}
KERNEL(blocks_write_own_words_legal, 2, 32) { data[blockIdx.x * 32 + threadIdx.x] = 1; }
KERNEL(block_reads_what_other_wrote, 2, 32) {
  if (blockIdx.x == 0) data[threadIdx.x] = 1;
  if (blockIdx.x == 1) data[32 + threadIdx.x] = data[threadIdx.x];  // expect: global-race-between-blocks
}
KERNEL(block_writes_what_others_read, 3, 32) {
  const int v = data[threadIdx.x];
  if (blockIdx.x == 2) data[threadIdx.x] = v + 1;  // expect: global-race-between-blocks
}
KERNEL(blocks_read_same_words_legal, 3, 32) {
  data[32 + blockIdx.x * 32 + threadIdx.x] = data[threadIdx.x];
}
KERNEL(atomics_of_blocks_legal, 4, 64) { atomicAdd(data, 1); }
KERNEL(atomic_and_plain_write, 2, 1) {
  if (blockIdx.x == 0) atomicAdd(data, 1);
  if (blockIdx.x == 1) data[0] = 1;  // expect: global-race-between-blocks
}

// The last block to finish sums what all have written.
KERNEL(last_block_sums_legal, 4, 32) {
  Shared& shared = shared_as<Shared>();
  data[64 + blockIdx.x * 32 + threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared.a[0] = atomicAdd(data, 1);
  }
  __syncthreads();
  if (shared.a[0] != data[1] + 3) return;
  for (int i = 0; i < 4; ++i) atomicAdd(data + 2, data[64 + i * 32 + threadIdx.x]);
}
KERNEL(last_block_sums_without_fence, 4, 32) {
  Shared& shared = shared_as<Shared>();
  data[64 + blockIdx.x * 32 + threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) shared.a[0] = atomicAdd(data, 1);
  __syncthreads();
  if (shared.a[0] != data[1] + 3) return;
  for (int i = 0; i < 4; ++i) {
    const int other = data[64 + i * 32 + threadIdx.x];  // expect: global-race-between-blocks
    atomicAdd(data + 2, other);
  }
}
KERNEL(read_only_data_written, 1, 1) {
  data[0] = 1;
  const uint4 v = ld16_nc(data);  // expect: read-only-data-written
  data[4] = static_cast<int>(v.x);
}
KERNEL(read_only_data_legal, 1, 1) { data[4] = static_cast<int>(ld16_nc(data).x); }

// ---- shared memory

KERNEL(shared_bounds, 1, 32) {
  int* words = reinterpret_cast<int*>(&shared_as<Shared>());
  words[sizeof(Shared) / 4 - 31 + threadIdx.x] = 1;  // expect: shared-out-of-bounds
}
KERNEL(array_bounds, 1, 32) {
  Shared& shared = shared_as<Shared>();
  shared.a[threadIdx.x + 97] = 1;  // expect: array-index-out-of-bounds
}
KERNEL(local_array_bounds, 1, 32) {
  int values[8] = {};
  for (unsigned i = 0; i <= threadIdx.x / 4; ++i) {
    values[i + 1] = data[i];  // expect: array-index-out-of-bounds
  }
  data[32 + threadIdx.x] = values[threadIdx.x % 8];
}
KERNEL(shared_misaligned, 1, 32) {
  Shared& shared = shared_as<Shared>();
  st16(&shared.a[threadIdx.x + 1], uint4{0, 0, 0, 0});  // expect: misaligned-access
}
KERNEL(shared_uninitialised, 1, 32) {
  Shared& shared = shared_as<Shared>();
  if (threadIdx.x != 7) shared.a[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x] = shared.a[threadIdx.x];  // expect: shared-uninitialised-read
}
KERNEL(shared_initialised_legal, 1, 32) {
  Shared& shared = shared_as<Shared>();
  shared.a[threadIdx.x] = 1;
  data[threadIdx.x] = shared.a[threadIdx.x];
}
KERNEL(shared_bytes_legal, 1, 64) {
  auto* bytes = reinterpret_cast<signed char*>(shared_as<Shared>().a);
  bytes[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x] = bytes[threadIdx.x ^ 33];
}
KERNEL(shared_race, 1, 64) {
  Shared& shared = shared_as<Shared>();
  for (int i = 0; i < 64; i += 32) shared.a[(threadIdx.x + i) % 64] = 0;  // expect: shared-race
}
KERNEL(shared_race_read, 1, 64) {
  Shared& shared = shared_as<Shared>();
  shared.a[threadIdx.x] = 1;  // expect: shared-race
  __syncwarp();
  data[threadIdx.x] = shared.a[threadIdx.x ^ 32];  // expect: shared-race shared-uninitialised-read
}
KERNEL(shared_race_legal, 1, 64) {
  Shared& shared = shared_as<Shared>();
  shared.a[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x] = shared.a[threadIdx.x ^ 32];
}
KERNEL(shared_race_in_warp, 1, 32) {
  Shared& shared = shared_as<Shared>();
  shared.a[threadIdx.x] = shared.b[threadIdx.x] = 1;
  data[threadIdx.x] = shared.a[threadIdx.x & ~1u];  // expect: shared-race
}
KERNEL(shared_race_in_warp_legal, 1, 32) {
  Shared& shared = shared_as<Shared>();
  shared.a[threadIdx.x] = 1;
  __syncwarp();
  data[threadIdx.x] = shared.a[threadIdx.x ^ 1];
}
// Shuffles wait for all lanes, but order no memory.
KERNEL(shared_race_despite_shuffle, 1, 32) {
  Shared& shared = shared_as<Shared>();
  shared.a[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
  const int value = __shfl_xor_sync(~0u, 1, 1);
  data[threadIdx.x] = value + shared.a[threadIdx.x ^ 1];  // expect: shared-race
}
KERNEL(buffer_reused_too_early, 1, 64) {
  Shared& shared = shared_as<Shared>();
  for (int i = 0; i < 2; ++i) {
    shared.a[threadIdx.x] = i;  // expect: shared-race
    __syncthreads();
    data[threadIdx.x] = shared.a[threadIdx.x ^ 32];  // expect: shared-race
  }
}
KERNEL(buffer_reused_legal, 1, 64) {
  Shared& shared = shared_as<Shared>();
  for (int i = 0; i < 2; ++i) {
    shared.a[threadIdx.x] = i;
    __syncthreads();
    data[threadIdx.x] = shared.a[threadIdx.x ^ 32];
    __syncthreads();
  }
}
KERNEL(broadcast_then_overwritten, 1, 32) {
  Shared& shared = shared_as<Shared>();
  if (threadIdx.x == 30) shared.a[0] = 1;
  __syncwarp();
  data[threadIdx.x] = shared.a[0];
  if (threadIdx.x == 30) shared.a[0] = 2;  // expect: shared-race
}
KERNEL(shared_atomics_legal, 1, 64) {
  Shared& shared = shared_as<Shared>();
  if (threadIdx.x == 0) shared.a[0] = 0;
  __syncthreads();
  atomicAdd(&shared.a[0], 1);
  __syncthreads();
  data[threadIdx.x] = shared.a[0];
}
KERNEL(shared_atomic_and_read, 1, 64) {
  Shared& shared = shared_as<Shared>();
  if (threadIdx.x == 0) shared.a[0] = 0;
  __syncthreads();
  atomicAdd(&shared.a[0], 1);  // expect: shared-race
  data[threadIdx.x] = shared.a[0];
}

// ---- cp.async

KERNEL(copy_not_waited_for, 1, 32) {
  Shared& shared = shared_as<Shared>();
  cp_async16(&shared.a[threadIdx.x * 4], data + threadIdx.x * 4);  // expect: cp-async-never-waited-for
  cp_async_commit();
  data[256 + threadIdx.x] = shared.a[threadIdx.x * 4];  // expect: cp-async-pending
}
KERNEL(copy_of_newer_group_read, 1, 1) {
  Shared& shared = shared_as<Shared>();
  cp_async16(&shared.a[0], data);
  cp_async_commit();
  cp_async16(&shared.a[4], data + 4);
  cp_async_commit();
  cp_async_wait<1>();
  data[8] = shared.a[0];
  data[9] = shared.a[4];  // expect: cp-async-pending
  cp_async_wait<0>();
}
KERNEL(copy_without_barrier, 1, 32) {
  Shared& shared = shared_as<Shared>();
  cp_async4(&shared.a[threadIdx.x], data + threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  data[64 + threadIdx.x] = shared.a[threadIdx.x & ~1u];  // expect: shared-race
}
KERNEL(copy_legal, 1, 64) {
  Shared& shared = shared_as<Shared>();
  cp_async8(&shared.a[threadIdx.x * 2], data + threadIdx.x * 2, threadIdx.x < 60);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  data[128 + threadIdx.x] = shared.a[threadIdx.x ^ 32];
}
KERNEL(copy_overwrites_what_is_read, 1, 64) {
  Shared& shared = shared_as<Shared>();
  shared.a[threadIdx.x] = 1;
  __syncthreads();
  data[128 + threadIdx.x] = shared.a[threadIdx.x ^ 32];  // expect: shared-race
  cp_async4(&shared.a[threadIdx.x], data + threadIdx.x);  // expect: shared-race
  cp_async_commit();
  cp_async_wait<0>();
}
KERNEL(copy_misaligned, 1, 1) {
  Shared& shared = shared_as<Shared>();
  cp_async16(&shared.a[0], data + 2);  // expect: misaligned-access
}
KERNEL(copy_out_of_bounds, 1, 1) {
  Shared& shared = shared_as<Shared>();
  cp_async16(&shared.a[0], data + kInts);  // expect: global-out-of-bounds
}
// A false predicate reads nothing, wherever the source is.
KERNEL(copy_switched_off_legal, 1, 1) {
  Shared& shared = shared_as<Shared>();
  cp_async16(&shared.a[0], data + kInts, false);
  cp_async_commit();
  cp_async_wait<0>();
  data[0] = shared.a[0];
}
KERNEL(copy_to_global, 1, 1) {
  cp_async16(data, data + 4);  // expect: not-shared-memory
}

// ---- barriers

KERNEL(barrier_in_two_branches, 1, 64) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    data[threadIdx.x] = 1;
    __syncthreads();  // expect: divergent-barrier
  }
}
KERNEL(barrier_not_reached, 1, 64) {
  if (threadIdx.x == 5) return;
  __syncthreads();  // expect: deadlock
  data[threadIdx.x] = 1;
}
KERNEL(named_barrier_legal, 1, 128) {
  Shared& shared = shared_as<Shared>();
  if (threadIdx.x >= 64) return;
  shared.a[threadIdx.x] = 1;
  barrier_sync(1, 64);
  data[threadIdx.x] = shared.a[threadIdx.x ^ 32];
}
KERNEL(named_barrier_of_others, 1, 128) {
  Shared& shared = shared_as<Shared>();
  const unsigned t = threadIdx.x;
  if (t < 64) {
    shared.a[t] = 1;
    barrier_sync(1, 64);
  } else {
    barrier_sync(2, 64);
    data[t] = shared.a[t - 64];  // expect: shared-race
  }
}
KERNEL(producer_consumer_legal, 1, 64) {
  Shared& shared = shared_as<Shared>();
  if (threadIdx.x < 32) {
    shared.a[threadIdx.x] = 1;
    barrier_arrive(1, 64);
  } else {
    barrier_sync(1, 64);
    data[threadIdx.x] = shared.a[threadIdx.x ^ 32];
  }
}
// Who only arrives learns nothing of what the others did before.
KERNEL(producer_writes_after_arriving, 1, 64) {
  Shared& shared = shared_as<Shared>();
  if (threadIdx.x < 32) {
    shared.a[threadIdx.x] = 1;
    barrier_sync(1, 64);
  } else {
    barrier_arrive(1, 64);
    shared.a[threadIdx.x ^ 32] = 2;  // expect: shared-race
  }
}
KERNEL(named_barrier_two_counts, 1, 64) {
  barrier_sync(1, threadIdx.x < 32 ? 64 : 32);  // expect: bad-barrier
}
KERNEL(named_barrier_odd_count, 1, 64) {
  barrier_sync(1, 40);  // expect: bad-barrier
}
KERNEL(barriers_crossed, 1, 64) {
  if (threadIdx.x < 32) {
    barrier_sync(1, 64);  // expect: deadlock
    barrier_sync(2, 64);
  } else {
    barrier_sync(2, 64);
    barrier_sync(1, 64);
  }
}

// ---- warps

KERNEL(shuffle_by_half_a_warp, 1, 32) {
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x < 16) value = __shfl_xor_sync(~0u, value, 1);  // expect: deadlock
  data[threadIdx.x] = value;
}
KERNEL(shuffle_by_halves_legal, 1, 32) {
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x < 16) {
    value = __shfl_xor_sync(0xffffu, value, 1);
  } else {
    value = __shfl_xor_sync(0xffff0000u, value, 2);
  }
  data[threadIdx.x] = value;
}
KERNEL(shuffle_from_absent_lane, 1, 32) {
  int value = static_cast<int>(threadIdx.x);
  if (threadIdx.x < 16) value = __shfl_xor_sync(0xffffu, value, 16);  // expect: shuffle-from-absent-lane
  data[threadIdx.x] = value;
}
KERNEL(shuffle_outside_its_mask, 1, 32) {
  data[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 1);  // expect: lane-outside-its-mask
}
KERNEL(shuffles_of_two_lines, 1, 32) {
  int value = 1;
  if (threadIdx.x < 16) {
    value = __shfl_xor_sync(~0u, value, 1);
  } else {
    value = __shfl_xor_sync(~0u, value, 2);  // expect: divergent-warp
  }
  data[threadIdx.x] = value;
}
KERNEL(mma_by_half_a_warp, 1, 16) {
  float d[4] = {};
  const uint32_t a[4] = {};
  mma_bf16(d, a, 0, 0);  // expect: partial-warp
  data[threadIdx.x] = static_cast<int>(d[0]);
}
KERNEL(ldmatrix_misaligned, 1, 32) {
  Shared& shared = shared_as<Shared>();
  shared.a[threadIdx.x] = 0;
  __syncwarp();
  uint32_t r[1];
  ldmatrix_x1(r, &shared.a[threadIdx.x % 8 * 4 + 1]);  // expect: misaligned-access
  data[threadIdx.x] = static_cast<int>(r[0]);
}
KERNEL(ldmatrix_uninitialised, 1, 32) {
  Shared& shared = shared_as<Shared>();
  if (threadIdx.x < 31) shared.a[threadIdx.x] = 0;
  __syncwarp();
  uint32_t r[1];
  ldmatrix_x1(r, &shared.a[threadIdx.x % 8 * 4]);  // expect: shared-uninitialised-read
  data[threadIdx.x] = static_cast<int>(r[0]);
}
KERNEL(ldmatrix_race, 1, 32) {
  Shared& shared = shared_as<Shared>();
  shared.a[threadIdx.x] = 0;
  uint32_t r[1];
  ldmatrix_x1(r, &shared.a[threadIdx.x % 8 * 4]);  // expect: shared-race
  data[threadIdx.x] = static_cast<int>(r[0]);
}
KERNEL(ldmatrix_of_global, 1, 32) {
  uint32_t r[1];
  ldmatrix_x1(r, data);  // expect: not-shared-memory
  data[threadIdx.x] = static_cast<int>(r[0]);
}

// ---- the rest

// Blocks run one after another, so that the first one waits for ever.
KERNEL(spin_on_another_block, 2, 1) {
  atomicExch(data + 1 - blockIdx.x, 1);
  while (atomicAdd(data + blockIdx.x, 0) == 0) {  // expect: endless-loop
  }
}

static volatile int a_static_variable;
KERNEL(static_variable, 1, 1) {
  a_static_variable = data[0];  // expect: write-to-static-variable
}
KERNEL(too_many_threads, 1, 1025) { data[0] = 1; }  // expect: bad-launch
KERNEL(syncwarp_of_some_lanes, 1, 32) {
  if (threadIdx.x < 16) __syncwarp(0xffff);  // expect: not-modelled
  data[threadIdx.x] = 1;
}
