// Every function of ptx.cuh, and the words of CUDA C++ that kernels use, called once per lane with
// data from outside: for tests/cuda/test_ptx.py (is the result right?) and
// tests/cuda/test_ptx_interpreter.py (does the device's half give the same?).
#include "kernels/cuda/ptx.cuh"

using namespace qn::cuda;

#define QN_EXPORT extern "C" [[gnu::visibility("default")]] int

// ---- tensor cores: registers in, registers out

__global__ void mma_bf16_kernel(float* d, const uint32_t* a, const uint32_t* b) {
  const unsigned lane = threadIdx.x;
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
  const uint32_t words[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  mma_bf16(sums, words, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}
QN_EXPORT wrapped_mma_bf16(float* d, const uint32_t* a, const uint32_t* b, cudaStream_t stream) {
  return launch("mma_bf16", mma_bf16_kernel, dim3(1), dim3(32), 0, stream, d, a, b);
}

__global__ void mma_f16_kernel(float* d, const uint32_t* a, const uint32_t* b) {
  const unsigned lane = threadIdx.x;
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
  const uint32_t words[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  mma_f16(sums, words, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}
QN_EXPORT wrapped_mma_f16(float* d, const uint32_t* a, const uint32_t* b, cudaStream_t stream) {
  return launch("mma_f16", mma_f16_kernel, dim3(1), dim3(32), 0, stream, d, a, b);
}

__global__ void mma_s8_kernel(int* d, const uint32_t* a, const uint32_t* b) {
  const unsigned lane = threadIdx.x;
  int sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
  const uint32_t words[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  mma_s8(sums, words, b[lane * 2], b[lane * 2 + 1]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}
QN_EXPORT wrapped_mma_s8(int* d, const uint32_t* a, const uint32_t* b, cudaStream_t stream) {
  return launch("mma_s8", mma_s8_kernel, dim3(1), dim3(32), 0, stream, d, a, b);
}

// ---- ldmatrix of up to four matrices, whose rows lie in shuffled order

constexpr int kRowStep = 5;  // row r lies at 5 r mod 32

struct Matrices {
  uint4 rows[32];
};

__global__ void ldmatrix_kernel(uint32_t* out, const uint4* rows) {
  Matrices& shared = shared_as<Matrices>();
  const unsigned lane = threadIdx.x;
  st16(&shared.rows[lane * kRowStep % 32], ld16(rows + lane));
  __syncwarp();
  const uint4* row = &shared.rows[lane * kRowStep % 32];
  uint32_t one[1], two[2], four[4];
  out += lane * 14;
  ldmatrix_x1(one, row);
  ldmatrix_x2(two, row);
  ldmatrix_x4(four, row);
  out[0] = one[0];
  for (int i = 0; i < 2; ++i) out[1 + i] = two[i];
  for (int i = 0; i < 4; ++i) out[3 + i] = four[i];
  ldmatrix_x1_trans(one, row);
  ldmatrix_x2_trans(two, row);
  ldmatrix_x4_trans(four, row);
  out[7] = one[0];
  for (int i = 0; i < 2; ++i) out[8 + i] = two[i];
  for (int i = 0; i < 4; ++i) out[10 + i] = four[i];
}
/// out [32 lanes][x1, x2, x4, x1.trans, x2.trans, x4.trans]; rows [4 matrices][8 rows] of 16 bytes.
QN_EXPORT wrapped_ldmatrix(uint32_t* out, const uint4* rows, cudaStream_t stream) {
  return launch("ldmatrix", ldmatrix_kernel, dim3(1), dim3(32), sizeof(Matrices), stream, out,
                rows);
}

// ---- numbers and arithmetic

constexpr int kArithmetic = 17;

__global__ void arithmetic_kernel(uint32_t* out, const float* x, const float* y, const uint32_t* a,
                                  const uint32_t* b, const uint32_t* c) {
  const unsigned i = blockIdx.x * 32 + threadIdx.x;
  out += i * kArithmetic;
  out[0] = pack_bf16(x[i], y[i]);
  out[1] = pack_f16(x[i], y[i]);
  out[2] = __float_as_uint(bf16_lo(a[i]));
  out[3] = __float_as_uint(bf16_hi(a[i]));
  out[4] = __float_as_uint(f16_lo(a[i]));
  out[5] = __float_as_uint(f16_hi(a[i]));
  out[6] = bf16x2_fma(a[i], b[i], c[i]);
  out[7] = f16x2_fma(a[i], b[i], c[i]);
  out[8] = and_or(a[i], b[i], c[i]);
  out[9] = byte_permute(a[i], b[i], c[i]);
  out[10] = static_cast<uint32_t>(dot4(a[i], b[i], static_cast<int>(c[i])));
  out[11] = __float_as_uint(exp2_approx(x[i]));
  out[12] = __float_as_uint(log2_approx(fabsf(x[i])));
  out[13] = __float_as_uint(rcp_approx(x[i]));
  out[14] = __float_as_uint(rsqrt_approx(fabsf(x[i])));
  out[15] = __umulhi(a[i], b[i]);
  out[16] = static_cast<uint32_t>(__popc(a[i]) | __clz(static_cast<int>(a[i])) << 8 |
                                  __ffs(static_cast<int>(a[i])) << 16);
}
/// out [n][17]; n is a multiple of 32.
QN_EXPORT wrapped_arithmetic(uint32_t* out, const float* x, const float* y, const uint32_t* a,
                             const uint32_t* b, const uint32_t* c, int64_t n, cudaStream_t stream) {
  return launch("arithmetic", arithmetic_kernel, dim3(static_cast<unsigned>(n / 32)), dim3(32), 0,
                stream, out, x, y, a, b, c);
}

// ---- what lanes do together

constexpr int kExchanges = 16;

__global__ void exchange_kernel(uint32_t* out, const uint32_t* x) {
  const unsigned lane = threadIdx.x;
  const uint32_t v = x[lane];
  const int s = static_cast<int>(v);
  out += lane * kExchanges;
  out[0] = __shfl_xor_sync(~0u, v, 5);
  out[1] = __shfl_sync(~0u, v, static_cast<int>(lane * 7 % 32));
  out[2] = __shfl_up_sync(~0u, v, 3);
  out[3] = __shfl_down_sync(~0u, v, 3);
  out[4] = __shfl_xor_sync(~0u, v, 3, 8);
  out[5] = __shfl_sync(~0u, v, 11, 8);
  out[6] = __shfl_up_sync(~0u, v, 2, 8);
  out[7] = __shfl_down_sync(~0u, v, 2, 8);
  out[8] = __ballot_sync(~0u, v & 1);
  out[9] = static_cast<uint32_t>(__any_sync(~0u, v == x[0]) | __all_sync(~0u, v != 0) << 1);
  out[10] = __reduce_add_sync(~0u, v);
  out[11] = static_cast<uint32_t>(__reduce_min_sync(~0u, s));
  out[12] = __reduce_max_sync(~0u, v);
  out[13] = __reduce_and_sync(~0u, v);
  out[14] = __reduce_or_sync(~0u, v & 0xff);
  out[15] = __reduce_xor_sync(~0u, v);
}
/// out [32][16]
QN_EXPORT wrapped_exchange(uint32_t* out, const uint32_t* x, cudaStream_t stream) {
  return launch("exchange", exchange_kernel, dim3(1), dim3(32), 0, stream, out, x);
}

// ---- memory

struct Copies {
  uint32_t four[64];
  uint32_t eight[64][2];
  uint4 sixteen[64];
};

__global__ void copy_kernel(uint32_t* out, const uint32_t* x) {
  Copies& shared = shared_as<Copies>();
  const unsigned t = threadIdx.x;
  cp_async4(&shared.four[t], x + t, t % 3 != 0);
  cp_async_commit();
  cp_async8(&shared.eight[t][0], x + t * 2, t % 5 != 0);
  cp_async_commit();
  cp_async16(&shared.sixteen[t], x + t * 4, t % 7 != 0);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  const uint2 pair = ld8(shared.eight[t ^ 32]);
  out[t] = shared.four[t ^ 32] + pair.x * 3 + pair.y * 5;
  cp_async_wait<0>();
  __syncthreads();
  const uint4 both = ld16_nc(x + t * 4), copied = ld16(&shared.sixteen[t ^ 32]);
  st16(out + 64 + t * 4, make_uint4(both.x + copied.x, copied.y, copied.z, copied.w));
  st8(out + 320 + t * 2, make_uint2(both.w, pair.x));
}
/// out [448], x [256], 64 threads
QN_EXPORT wrapped_copy(uint32_t* out, const uint32_t* x, cudaStream_t stream) {
  return launch("copy", copy_kernel, dim3(1), dim3(64), sizeof(Copies), stream, out, x);
}

__global__ void atomic_kernel(uint32_t* out, float* sum, const uint32_t* x) {
  const unsigned t = blockIdx.x * 64 + threadIdx.x;
  const uint32_t v = x[t];
  atomicAdd(out, v);
  atomicMax(out + 1, v);
  atomicMin(out + 2, v);
  atomicOr(out + 3, v & 0xff);
  atomicAnd(out + 4, v | 0xff);
  atomicInc(out + 5, 99);
  atomicMax(reinterpret_cast<int*>(out + 6), static_cast<int>(v));
  atomicCAS(out + 7, 0u, 7u);
  atomicExch(out + 8 + t, v);
  atomicAdd(sum, 0.25f);
}
/// out [8 + 128], all of it initialised; sum [1]; x [128]; two blocks of 64 threads
QN_EXPORT wrapped_atomic(uint32_t* out, float* sum, const uint32_t* x, cudaStream_t stream) {
  return launch("atomic", atomic_kernel, dim3(2), dim3(64), 0, stream, out, sum, x);
}

struct Handed {
  uint32_t values[64];
};

// Warp 1 hands to warp 0 while warps 2 and 3 exchange on another barrier; grid and block have three
// dimensions.
__global__ void roles_kernel(uint32_t* out) {
  Handed& shared = shared_as<Handed>();
  const unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out += block * 128;
  if (t < 32) {
    barrier_sync(1, 64);
    out[t] = shared.values[31 - t];
  } else if (t < 64) {
    shared.values[t - 32] = t * 3 + block;
    barrier_arrive(1, 64);
    out[t] = t;
  } else {
    if (t < 96) shared.values[t - 32] = t;
    barrier_sync(2, 64);
    out[t] = shared.values[32 + t % 32];
  }
}
/// out [12 blocks][128]
QN_EXPORT wrapped_roles(uint32_t* out, cudaStream_t stream) {
  return launch("roles", roles_kernel, dim3(3, 2, 2), dim3(8, 4, 4), sizeof(Handed), stream, out);
}
