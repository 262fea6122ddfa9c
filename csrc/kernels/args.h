// One POD per kernel: pointers with their shapes, strides in elements. Ops fill and check these;
// kernels trust them.
#pragma once
#include <stdint.h>

#include "core/dtype.h"
#include "kernels/quant_layout.h"

namespace qn {

struct RmsNormArgs {
  void* out;           // [rows, cols]
  const void* x;       // [rows, cols]
  void* residual;      // [rows, cols], in-out, or null: residual += x, then out = norm(residual)
  const void* weight;  // [cols]
  int64_t cols;
  int64_t out_stride, x_stride, residual_stride;  // elements between rows
  float eps;
  DType dtype;         // of out, x and residual: F32 | BF16
  DType weight_dtype;  // F32 | BF16
};

struct RopeArgs {
  void* x;           // [tokens, heads, head_dim], in-out
  const float* cos;  // [tokens, half]
  const float* sin;  // [tokens, half]
  int64_t heads;
  int64_t half;  // rope_dim / 2
  int64_t token_stride, head_stride, cos_stride, sin_stride;
  DType dtype;  // of x: F32 | BF16
};

/// Columns that one unit of work of swiglu covers, so that a single row can be split between
/// threads.
constexpr int64_t kSwigluBlock = 1024;

struct SwigluArgs {
  void* out;         // [tokens, inter]
  const void* gate;  // [tokens, inter]
  const void* up;    // [tokens, inter]
  int64_t inter;
  int64_t out_stride, gate_stride, up_stride;
  DType dtype;  // of all three: F32 | BF16
};

struct GatherArgs {
  float* out;          // [tokens, table.cols]
  const int32_t* ids;  // [tokens], each in [0, table.rows)
  WeightView table;
  int64_t out_stride, ids_stride;
};

/// Elements that one partial result over a long row covers.
constexpr int64_t kReduceBlock = 128;

struct BlockReduceArgs {
  float* out;      // [ceil(n / kReduceBlock)]
  const float* x;  // [n]
  int64_t n;
  float shift, scale;  // block_exp_sum only
};

enum class ProbeKind : uint8_t { ReadStreams, FmaF32, DotInt8, TileInt8, TileBf16 };

/// Measures the machine, not a model: what a loop of nothing but loads or nothing but
/// multiplications achieves.
struct ProbeArgs {
  ProbeKind kind;
  const void* data;    // ReadStreams: [blocks * kProbeBlockBytes]
  int64_t iterations;  // of the multiplying loops
  double* work;  // [end]: work[begin] += bytes read or operations done; stays 0 where the level
                 // lacks the kind
  volatile float* sink;  // [end]: receives a value that depends on all of the work
};

constexpr int64_t kProbeBlockBytes = 4096;

/// out = x W^T + bias, or += with `add`. At a level that packs x for bf16 weights, gemm_bf16 reads
/// `packed_x`.
struct GemmFloatArgs {
  float* out;          // [tokens, rows]
  const float* x;      // [tokens, cols], dense rows
  const void* weight;  // [rows, cols], dense rows; may lie at any byte address (a mapped file)
  const float* bias;   // [rows] or null
  void* packed_x;      // written by gemm_bf16_pack_x, read by gemm_bf16
  void* scratch;       // of the calling thread
  int64_t tokens, rows, cols;
  int64_t out_stride, x_stride, weight_stride;  // elements between rows
  bool add;                                     // the epilogue: out += instead of out =
};

/// Bytes of scratch memory that a GEMM asks for.
struct GemmWorkspace {
  int64_t packed_x;  // shared by all threads; 0: the kernel takes x as it is
  int64_t per_thread;
};

}  // namespace qn
