// Access patterns whose sectors and wavefronts are known, for tests/cuda/test_counters.py. Every
// kernel is one block of one warp unless its launcher says otherwise.
#include "kernels/cuda/ptx.cuh"

using namespace qn::cuda;

struct Tile {
  uint4 rows[64][8];  // 128 bytes each
};

#define PATTERN(name, blocks, threads)                                                          \
  static __global__ void name##_kernel(float* out, const float* x);                             \
  extern "C" [[gnu::visibility("default")]] int name(float* out, const float* x,                \
                                                     cudaStream_t stream) {                     \
    return launch(#name, name##_kernel, dim3(blocks), dim3(threads), sizeof(Tile), stream, out, \
                  x);                                                                           \
  }                                                                                             \
  static __global__ void name##_kernel([[maybe_unused]] float* out, [[maybe_unused]] const float* x)

// ---- global memory

PATTERN(load_packed, 1, 32) {
  if (x[threadIdx.x] == 0.5f) out[0] = 1.0f;
}
PATTERN(load_vectors, 1, 32) {
  if (ld16(x + threadIdx.x * 4).x == 1) out[0] = 1.0f;
}
PATTERN(load_broadcast, 1, 32) {
  if (x[3] == 0.5f) out[threadIdx.x] = 1.0f;
}
PATTERN(load_shifted, 1, 32) {
  if (x[threadIdx.x + 1] == 0.5f) out[0] = 1.0f;
}
PATTERN(load_strided, 1, 32) {
  if (x[threadIdx.x * 8] == 0.5f) out[0] = 1.0f;
}
PATTERN(load_by_some_lanes, 1, 32) {
  if (threadIdx.x % 4 == 0 && x[threadIdx.x] == 0.5f) out[0] = 1.0f;
}
// Lanes go round the loop a different number of times.
PATTERN(load_in_divergent_loop, 1, 32) {
  for (unsigned i = 0; i <= threadIdx.x / 16; ++i) {
    if (x[threadIdx.x + i * 32] == 0.5f) out[0] = 1.0f;
  }
}
PATTERN(load_twice, 2, 64) {
  for (int i = 0; i < 2; ++i) {
    if (x[threadIdx.x] == 0.5f) out[0] = 1.0f;
    __syncthreads();
  }
}
PATTERN(store_packed, 1, 32) { out[threadIdx.x] = 1.0f; }
PATTERN(store_strided, 1, 32) { out[threadIdx.x * 8] = 1.0f; }
PATTERN(store_halves, 1, 32) {
  st8(out + threadIdx.x * 4, make_uint2(0, 0));  // half of every sector
}
PATTERN(copy_async, 1, 32) {
  Tile& tile = shared_as<Tile>();
  cp_async16(&tile.rows[0][0] + threadIdx.x, x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
}

// ---- shared memory: the stores come first and are packed

PATTERN(shared_packed, 1, 32) { reinterpret_cast<float*>(&shared_as<Tile>())[threadIdx.x] = 1.0f; }
PATTERN(shared_stride_4, 1, 32) {
  reinterpret_cast<float*>(&shared_as<Tile>())[threadIdx.x * 4] = 1.0f;
}
PATTERN(shared_stride_33, 1, 32) {
  reinterpret_cast<float*>(&shared_as<Tile>())[threadIdx.x * 33] = 1.0f;
}
PATTERN(shared_column, 1, 32) {
  reinterpret_cast<float*>(&shared_as<Tile>())[threadIdx.x * 32] = 1.0f;
}
PATTERN(shared_vectors, 1, 32) { st16(&shared_as<Tile>().rows[0][0] + threadIdx.x, uint4{}); }
PATTERN(shared_vector_column, 1, 32) { st16(&shared_as<Tile>().rows[threadIdx.x][0], uint4{}); }
PATTERN(shared_vector_swizzled, 1, 32) {
  st16(&shared_as<Tile>().rows[threadIdx.x][threadIdx.x % 8], uint4{});
}
PATTERN(shared_pairs, 1, 32) {
  st8(reinterpret_cast<float*>(&shared_as<Tile>()) + threadIdx.x * 2, uint2{});
}

// ---- ldmatrix of rows 128 bytes apart

template <bool Swizzle>
QN_DEV void read_matrices(float* out) {
  Tile& tile = shared_as<Tile>();
  for (int i = 0; i < 8; ++i) st16(&tile.rows[threadIdx.x][i], uint4{});
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, &tile.rows[threadIdx.x][Swizzle ? threadIdx.x % 8 : 0]);
  out[threadIdx.x] = __uint_as_float(r[0] + r[1] + r[2] + r[3]);
}
PATTERN(ldmatrix_column, 1, 32) { read_matrices<false>(out); }
PATTERN(ldmatrix_swizzled, 1, 32) { read_matrices<true>(out); }
