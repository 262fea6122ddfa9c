// Everything that CUDA C++ has no words for: the only file with inline PTX, and the only one that
// tells the device's compiler from the host's. Kernels include this file and nothing else of CUDA.
//
// The host's half (simt/ptx_host.h) declares the same functions for the SIMT executor, which tests
// run; docs/CUDA.md lists what a kernel source may use so that both compilers take it. Change the
// two halves together: tests/cuda/test_ptx_interpreter.py runs this one.
//
//   launch        launch(name, kernel, grid, block, shared_bytes, stream, arguments...)
//   shared        shared_as<T>
//   memory        ld8 ld16 ld16_nc st4 st8 st16
//   numbers       bf16_lo bf16_hi to_float pack_bf16 pack_f16 f16_lo f16_hi
//   arithmetic    bf16x2_fma f16x2_fma and_or byte_permute dot4 exp2_approx log2_approx rcp_approx
//                 rsqrt_approx
//   copies        cp_async4 cp_async8 cp_async16 cp_async_commit cp_async_wait
//   tensor cores  ldmatrix_x1/x2/x4(_trans) mma_bf16 mma_f16 mma_s8
//   barriers      barrier_sync barrier_arrive
#pragma once
#include <stdint.h>
#include <string.h>

#include "core/dtype.h"

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define QN_DEV __device__ __forceinline__

namespace qn::cuda {

// ---- launch

/// Starts a kernel; returns a cudaError_t, 0 when it was started.
template <typename... Parameters, typename... Arguments>
int launch(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
           cudaStream_t stream, const Arguments&... arguments) {
  constexpr size_t kWithoutOptIn = 48 << 10;
  if (shared_bytes > kWithoutOptIn) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// ---- shared memory

/// The block's shared memory as the kernel's one struct; the launch passes sizeof(T), or more for
/// an array behind it.
template <typename T>
QN_DEV T& shared_as() {
  extern __shared__ __align__(1024) unsigned char qn_shared_memory[];
  return *reinterpret_cast<T*>(qn_shared_memory);
}

QN_DEV uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- memory: one instruction each, whatever the element type

QN_DEV uint2 ld8(const void* p) { return *static_cast<const uint2*>(p); }
QN_DEV uint4 ld16(const void* p) { return *static_cast<const uint4*>(p); }
QN_DEV void st4(void* p, uint32_t v) { *static_cast<uint32_t*>(p) = v; }
QN_DEV void st8(void* p, uint2 v) { *static_cast<uint2*>(p) = v; }
QN_DEV void st16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

/// Streams data that is read once and not written by this launch past L1, such as weights.
QN_DEV uint4 ld16_nc(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// ---- numbers

QN_DEV float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

/// Two floats as bf16, rounded to nearest even. The instruction's first source is the upper half.
QN_DEV uint32_t pack_bf16(float lo, float hi) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
QN_DEV uint32_t pack_f16(float lo, float hi) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
QN_DEV float f16_lo(uint32_t v) {
  float f;
  asm("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, lo; }" : "=f"(f) : "r"(v));
  return f;
}
QN_DEV float f16_hi(uint32_t v) {
  float f;
  asm("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, hi; }" : "=f"(f) : "r"(v));
  return f;
}

// ---- arithmetic

/// a * b + c of two bf16 pairs, each rounded once.
QN_DEV uint32_t bf16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
QN_DEV uint32_t f16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
/// (a & mask) | bits in one instruction: 0xEA is the truth table of (x & y) | z.
QN_DEV uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}
/// Byte i of the result is byte (selector >> 4 i) & 7 of hi:lo.
QN_DEV uint32_t byte_permute(uint32_t lo, uint32_t hi, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(lo), "r"(hi), "r"(selector));
  return d;
}
/// c + the products of four signed bytes.
QN_DEV int dot4(uint32_t a, uint32_t b, int c) {
  int d;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// Approximations of the special function unit, about 2 ulp; subnormals are flushed to zero.
QN_DEV float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
QN_DEV float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
QN_DEV float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
QN_DEV float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- asynchronous copies from global to shared memory; zeros when `ok` is false

QN_DEV void cp_async4(void* to, const void* from, bool ok = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(ok ? 4 : 0)
               : "memory");
}
QN_DEV void cp_async8(void* to, const void* from, bool ok = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(ok ? 8 : 0)
               : "memory");
}
/// Past L1, the only size that can.
QN_DEV void cp_async16(void* to, const void* from, bool ok = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(ok ? 16 : 0)
               : "memory");
}
QN_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `Left` of this thread's newest groups are under way.
template <int Left>
QN_DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// ---- tensor cores. Fragment layouts: PTX ISA, "Warp-Level Matrix Instructions"

// 8x8 matrices of 16-bit elements: lane 8 m + r gives the address of row r of matrix m.
QN_DEV void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
QN_DEV void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
QN_DEV void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
QN_DEV void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
QN_DEV void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
QN_DEV void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b over a 16x8 tile, 16 (bf16, f16) or 32 (s8) deep.
QN_DEV void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
QN_DEV void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
QN_DEV void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- named barriers (1 to 15; 0 is __syncthreads) of some of the block's warps

QN_DEV void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// Counts as arrived without waiting.
QN_DEV void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace qn::cuda

#else
#include "kernels/cuda/simt/ptx_host.h"
#endif

namespace qn::cuda {

// The lower and upper element of a bf16 pair.
QN_DEV float bf16_lo(uint32_t v) { return bits_to_float(v << 16); }
QN_DEV float bf16_hi(uint32_t v) { return bits_to_float(v & 0xffff0000u); }
QN_DEV float to_float(bf16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }

}  // namespace qn::cuda
