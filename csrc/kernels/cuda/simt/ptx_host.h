// The host's half of ptx.cuh: the same functions, carried out by the SIMT executor, and those words
// of CUDA C++ that kernels use. QN_SIMT_CHECKED is set where every memory access is checked.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/simt/executor.h"
#include "kernels/scalar.h"

// ---- CUDA C++

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// A variable of this kind would silently lie on the thread's stack.
#define __shared__ _Pragma("GCC error \"use shared_as<T>() instead of __shared__\"")
#define QN_DEV inline __attribute__((always_inline))

#define threadIdx (qn::simt::current->thread_idx)
#define blockIdx (qn::simt::current->block_idx)
#define blockDim (qn::simt::block_dim)
#define gridDim (qn::simt::grid_dim)

using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

namespace qn::simt {
template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace qn::simt

inline float __uint_as_float(unsigned v) { return qn::simt::bit_cast<float>(v); }
inline float __int_as_float(int v) { return qn::simt::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return qn::simt::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return qn::simt::bit_cast<int>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
/// Rounds to nearest, ties to even.
inline int __float2int_rn(float v) { return static_cast<int>(std::nearbyint(v)); }

// ---- what the threads of a block do together

inline void __syncthreads(qn::simt::Site site = qn::simt::Site::current()) {
  qn::simt::barrier(0, 0, true, site);
}
inline void __syncwarp(unsigned mask = ~0u, qn::simt::Site site = qn::simt::Site::current()) {
  qn::simt::syncwarp(mask, site);
}
inline void __threadfence() { qn::simt::threadfence(); }

namespace qn::simt {

/// `source` is a lane; values of 4 or 8 bytes.
template <typename T>
inline T shuffle(unsigned mask, T value, int source, Site site) {
  constexpr size_t kWords = sizeof(T) / 4;
  static_assert(sizeof(T) % 4 == 0 && kWords <= 2);
  uint32_t words[kWords];
  memcpy(words, &value, sizeof value);
  for (uint32_t& word : words) {
    ShuffleArgument argument{word, 0, source};
    collective(kShuffle, &argument, mask, site);
    word = argument.result;
  }
  memcpy(&value, words, sizeof value);
  return value;
}

/// `lane` when it lies in the caller's group of `width` lanes, else the caller's own.
inline int within_group(int lane, int width) {
  const int mine = current->lane, first = mine / width * width;
  return lane >= first && lane < first + width ? lane : mine;
}

inline uint32_t ballot(unsigned mask, bool predicate, Site site) {
  BallotArgument argument{predicate, 0};
  collective(kBallot, &argument, mask, site);
  return argument.result;
}

template <typename T>
inline T reduce(unsigned mask, T value, Reduction reduction, Site site) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>);
  ReduceArgument argument{static_cast<uint32_t>(value), 0, reduction, std::is_signed_v<T>};
  collective(kReduce, &argument, mask, site);
  return static_cast<T>(argument.result);
}

}  // namespace qn::simt

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                     qn::simt::Site site = qn::simt::Site::current()) {
  const int first = qn::simt::current->lane / width * width;
  return qn::simt::shuffle(mask, value, first + (source & (width - 1)), site);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                         qn::simt::Site site = qn::simt::Site::current()) {
  const int source = qn::simt::within_group(qn::simt::current->lane ^ lanes, width);
  return qn::simt::shuffle(mask, value, source, site);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                        qn::simt::Site site = qn::simt::Site::current()) {
  const int source = qn::simt::current->lane - static_cast<int>(by);
  return qn::simt::shuffle(mask, value, qn::simt::within_group(source, width), site);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                          qn::simt::Site site = qn::simt::Site::current()) {
  const int source = qn::simt::current->lane + static_cast<int>(by);
  return qn::simt::shuffle(mask, value, qn::simt::within_group(source, width), site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              qn::simt::Site site = qn::simt::Site::current()) {
  return qn::simt::ballot(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate,
                      qn::simt::Site site = qn::simt::Site::current()) {
  return qn::simt::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      qn::simt::Site site = qn::simt::Site::current()) {
  return qn::simt::ballot(mask, predicate == 0, site) == 0;
}

template <typename T>
inline T __reduce_add_sync(unsigned mask, T value,
                           qn::simt::Site site = qn::simt::Site::current()) {
  return qn::simt::reduce(mask, value, qn::simt::Reduction::Add, site);
}
template <typename T>
inline T __reduce_min_sync(unsigned mask, T value,
                           qn::simt::Site site = qn::simt::Site::current()) {
  return qn::simt::reduce(mask, value, qn::simt::Reduction::Min, site);
}
template <typename T>
inline T __reduce_max_sync(unsigned mask, T value,
                           qn::simt::Site site = qn::simt::Site::current()) {
  return qn::simt::reduce(mask, value, qn::simt::Reduction::Max, site);
}
template <typename T>
inline T __reduce_and_sync(unsigned mask, T value,
                           qn::simt::Site site = qn::simt::Site::current()) {
  return qn::simt::reduce(mask, value, qn::simt::Reduction::And, site);
}
template <typename T>
inline T __reduce_or_sync(unsigned mask, T value, qn::simt::Site site = qn::simt::Site::current()) {
  return qn::simt::reduce(mask, value, qn::simt::Reduction::Or, site);
}
template <typename T>
inline T __reduce_xor_sync(unsigned mask, T value,
                           qn::simt::Site site = qn::simt::Site::current()) {
  return qn::simt::reduce(mask, value, qn::simt::Reduction::Xor, site);
}

// ---- memory: out of line and not instrumented, so that each is one access at the caller's line

#ifdef QN_SIMT_CHECKED
#define QN_SIMT_MEMORY __attribute__((noinline, no_sanitize("thread", "alignment")))
#define QN_SIMT_ACCESS(pointer, bytes, kind) \
  qn::simt::access(pointer, bytes, qn::simt::Access::kind, __builtin_return_address(0))
#else
#define QN_SIMT_MEMORY
#define QN_SIMT_ACCESS(pointer, bytes, kind) static_cast<void>(0)
#endif

// Threads run one at a time and change only where they wait: plain code is atomic.
#define QN_SIMT_ATOMIC(name, result)                                    \
  template <typename T>                                                 \
  inline QN_SIMT_MEMORY T name(T* p, std::type_identity_t<T> operand) { \
    QN_SIMT_ACCESS(p, sizeof(T), Atomic);                               \
    const T old = *p;                                                   \
    *p = result;                                                        \
    return old;                                                         \
  }
QN_SIMT_ATOMIC(atomicAdd, old + operand)
QN_SIMT_ATOMIC(atomicMax, old < operand ? operand : old)
QN_SIMT_ATOMIC(atomicMin, operand < old ? operand : old)
QN_SIMT_ATOMIC(atomicExch, operand)
QN_SIMT_ATOMIC(atomicOr, old | operand)
QN_SIMT_ATOMIC(atomicAnd, old& operand)
/// Counts up to `operand`, then starts again at 0.
QN_SIMT_ATOMIC(atomicInc, old >= operand ? 0 : old + 1)
#undef QN_SIMT_ATOMIC

template <typename T>
inline QN_SIMT_MEMORY T atomicCAS(T* p, std::type_identity_t<T> expected,
                                  std::type_identity_t<T> desired) {
  QN_SIMT_ACCESS(p, sizeof(T), Atomic);
  const T old = *p;
  if (old == expected) *p = desired;
  return old;
}

namespace qn::cuda {

#ifdef QN_SIMT_CHECKED
constexpr bool kInstrumented = true;
#else
constexpr bool kInstrumented = false;
#endif

inline QN_SIMT_MEMORY uint2 ld8(const void* p) {
  QN_SIMT_ACCESS(p, 8, Read);
  return *static_cast<const uint2*>(p);
}
inline QN_SIMT_MEMORY uint4 ld16(const void* p) {
  QN_SIMT_ACCESS(p, 16, Read);
  return *static_cast<const uint4*>(p);
}
inline QN_SIMT_MEMORY uint4 ld16_nc(const void* p) {
  QN_SIMT_ACCESS(p, 16, ReadOnly);
  return *static_cast<const uint4*>(p);
}
inline QN_SIMT_MEMORY void st4(void* p, uint32_t v) {
  QN_SIMT_ACCESS(p, 4, Write);
  *static_cast<uint32_t*>(p) = v;
}
inline QN_SIMT_MEMORY void st8(void* p, uint2 v) {
  QN_SIMT_ACCESS(p, 8, Write);
  *static_cast<uint2*>(p) = v;
}
inline QN_SIMT_MEMORY void st16(void* p, uint4 v) {
  QN_SIMT_ACCESS(p, 16, Write);
  *static_cast<uint4*>(p) = v;
}

template <typename T>
QN_DEV T& shared_as() {
  return *reinterpret_cast<T*>(simt::shared_memory);
}

// ---- launch

template <typename... Parameters, typename... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
           size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  const auto closure = [=] { kernel(Parameters(arguments)...); };
  static_assert(std::is_trivially_copyable_v<decltype(closure)>);
  const auto body = [](const void* c) { (*static_cast<decltype(closure)*>(c))(); };
  const auto start = [&](const Parameters&... converted) {
    const simt::Argument list[] = {{&converted, sizeof converted}..., {nullptr, 0}};
    return simt::submit({name,
                         reinterpret_cast<const void*>(kernel),
                         {grid.x, grid.y, grid.z},
                         {block.x, block.y, block.z},
                         shared_bytes,
                         body,
                         &closure,
                         sizeof closure,
                         list,
                         static_cast<int>(sizeof...(Parameters)),
                         kInstrumented},
                        stream);
  };
  return start(Parameters(arguments)...);
}

// ---- numbers. NaN results have the instruction's pattern, 0x7fff

QN_DEV float bits_to_float(uint32_t bits) { return simt::bit_cast<float>(bits); }

inline uint32_t round_to_bf16(float f) {
  return f != f ? 0x7fffu : math::base::float_to_bf16(f).bits;
}
inline uint32_t round_to_f16(float f) { return f != f ? 0x7fffu : math::base::float_to_half(f); }
inline uint32_t pack_bf16(float lo, float hi) {
  return round_to_bf16(lo) | round_to_bf16(hi) << 16;
}
inline uint32_t pack_f16(float lo, float hi) { return round_to_f16(lo) | round_to_f16(hi) << 16; }
inline float f16_lo(uint32_t v) { return math::base::half_to_float(static_cast<uint16_t>(v)); }
inline float f16_hi(uint32_t v) {
  return math::base::half_to_float(static_cast<uint16_t>(v >> 16));
}

// ---- arithmetic

/// The float that rounds to the same bf16 or f16 as the double: rounding twice to nearest could
/// tip a tie, rounding to odd first cannot.
inline float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = static_cast<double>(nearest);
  const uint32_t bits = simt::bit_cast<uint32_t>(nearest);
  if (back == x || x != x || (bits & 1) != 0) return nearest;
  const bool away = std::fabs(back) > std::fabs(x);
  return simt::bit_cast<float>(away ? bits - 1 : bits + 1);
}
inline float exact_fma(float a, float b, float c) {
  return round_to_odd(
      std::fma(static_cast<double>(a), static_cast<double>(b), static_cast<double>(c)));
}
inline uint32_t bf16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  const auto lo = [](uint32_t v) { return bits_to_float(v << 16); };
  const auto hi = [](uint32_t v) { return bits_to_float(v & 0xffff0000u); };
  return pack_bf16(exact_fma(lo(a), lo(b), lo(c)), exact_fma(hi(a), hi(b), hi(c)));
}
inline uint32_t f16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  return pack_f16(exact_fma(f16_lo(a), f16_lo(b), f16_lo(c)),
                  exact_fma(f16_hi(a), f16_hi(b), f16_hi(c)));
}
QN_DEV uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline uint32_t byte_permute(uint32_t lo, uint32_t hi, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(hi) << 32 | lo;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = selector >> 4 * i & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (which & 7)) & 0xff;
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign, replicated
    result |= byte << 8 * i;
  }
  return result;
}
inline int dot4(uint32_t a, uint32_t b, int c) {
  for (int i = 0; i < 32; i += 8) {
    c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  }
  return c;
}
/// Subnormals become zeros of their sign.
inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline float flush(double x) { return flush(static_cast<float>(x)); }
// Through double: correctly rounded (nearly always), so that other implementations can agree.
inline float exp2_approx(float x) { return flush(std::exp2(static_cast<double>(flush(x)))); }
inline float log2_approx(float x) { return flush(std::log2(static_cast<double>(flush(x)))); }
inline float rcp_approx(float x) { return flush(1.0 / static_cast<double>(flush(x))); }
inline float rsqrt_approx(float x) { return flush(1.0 / std::sqrt(static_cast<double>(flush(x)))); }

// ---- copies

QN_DEV void cp_async4(void* to, const void* from, bool ok = true) {
  simt::cp_async(to, from, 4, ok ? 4 : 0);
}
QN_DEV void cp_async8(void* to, const void* from, bool ok = true) {
  simt::cp_async(to, from, 8, ok ? 8 : 0);
}
QN_DEV void cp_async16(void* to, const void* from, bool ok = true) {
  simt::cp_async(to, from, 16, ok ? 16 : 0);
}
QN_DEV void cp_async_commit() { simt::cp_async_commit(); }
template <int Left>
QN_DEV void cp_async_wait() {
  simt::cp_async_wait(Left);
}

// ---- tensor cores

#define QN_SIMT_LDMATRIX(name, matrices, operation)           \
  inline void name(uint32_t (&r)[matrices], const void* row,  \
                   simt::Site site = simt::Site::current()) { \
    simt::LdmatrixArgument argument{row, r, matrices};        \
    simt::collective(simt::operation, &argument, ~0u, site);  \
  }
QN_SIMT_LDMATRIX(ldmatrix_x1, 1, kLdmatrix)
QN_SIMT_LDMATRIX(ldmatrix_x2, 2, kLdmatrix)
QN_SIMT_LDMATRIX(ldmatrix_x4, 4, kLdmatrix)
QN_SIMT_LDMATRIX(ldmatrix_x1_trans, 1, kLdmatrixTrans)
QN_SIMT_LDMATRIX(ldmatrix_x2_trans, 2, kLdmatrixTrans)
QN_SIMT_LDMATRIX(ldmatrix_x4_trans, 4, kLdmatrixTrans)
#undef QN_SIMT_LDMATRIX

#define QN_SIMT_MMA(name, accumulator, operation)                                        \
  inline void name(accumulator(&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, \
                   simt::Site site = simt::Site::current()) {                            \
    const uint32_t b[2] = {b0, b1};                                                      \
    simt::MmaArgument argument{d, a, b};                                                 \
    simt::collective(simt::operation, &argument, ~0u, site);                             \
  }
QN_SIMT_MMA(mma_bf16, float, kMmaBf16)
QN_SIMT_MMA(mma_f16, float, kMmaF16)
QN_SIMT_MMA(mma_s8, int, kMmaS8)
#undef QN_SIMT_MMA

// ---- named barriers

inline void barrier_sync(int id, int threads, simt::Site site = simt::Site::current()) {
  simt::barrier(id, threads, true, site);
}
inline void barrier_arrive(int id, int threads, simt::Site site = simt::Site::current()) {
  simt::barrier(id, threads, false, site);
}

}  // namespace qn::cuda
