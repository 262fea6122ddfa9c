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

/// Rows whose share of dweight is summed one after the other; the sums of the blocks are then added
/// pairwise, so that the result depends on the number of rows alone.
constexpr int64_t kNormBlock = 32;

struct RmsNormBwdArgs {
  void* dx;                   // [rows, cols]
  void* dweight;              // [cols]
  float* partial;             // [ceil(rows / kNormBlock), cols]
  const void* dy;             // [rows, cols]
  const void* x;              // [rows, cols]
  const void* residual_grad;  // [rows, cols], added to dx, or null
  const void* weight;         // [cols]
  int64_t rows, cols;
  int64_t dx_stride, dy_stride, x_stride, residual_stride;  // elements between rows
  float eps;
  DType dtype;         // of dx, dy, x and residual_grad: F32 | BF16
  DType weight_dtype;  // of weight and dweight: F32 | BF16
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

struct SwigluBwdArgs {
  void* dgate;       // [tokens, inter]
  void* dup;         // [tokens, inter]
  const void* dout;  // [tokens, inter]
  const void* gate;  // [tokens, inter]
  const void* up;    // [tokens, inter]
  int64_t inter;
  int64_t dgate_stride, dup_stride, dout_stride, gate_stride, up_stride;
  DType dtype;  // of all five: F32 | BF16
};

struct SoftmaxXentArgs {
  float* log_prob;         // [rows]
  void* logits;            // [rows, vocab], in-out
  const int32_t* targets;  // [rows], in [0, vocab), or -1: no target
  const float* grad;       // [rows], of log_prob, or null: logits stay as they are
  int64_t vocab;
  int64_t logits_stride;  // elements between rows
  float scale;            // of the logits
  DType dtype;            // of logits: F32 | BF16
};

/// Elements that one unit of work of squared_norm covers.
constexpr int64_t kSquaredNormBlock = 4096;

struct SquaredNormArgs {
  double* partial;  // [ceil(n / kSquaredNormBlock)]
  const void* x;    // [n]
  int64_t n;
  DType dtype;  // F32 | BF16
};

/// Elements that one unit of work of adamw covers.
constexpr int64_t kAdamwBlock = 16384;

struct AdamwArgs {
  float* master;     // [n], in-out
  float* mean;       // [n], in-out
  float* square;     // [n], in-out
  bf16* parameter;   // [n], the rounded master, or null
  const void* grad;  // [n]
  int64_t n;
  float grad_scale;
  float beta1, rest1, beta2, rest2, eps;  // rest: 1 - beta
  float keep;                             // of the master: 1 - rate * weight_decay
  float rate;                             // of mean / (sqrt(square * correction2) + eps)
  float correction2;                      // 1 / (1 - beta2^step)
  DType grad_dtype;                       // F32 | BF16
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

enum class ProbeKind : uint8_t { ReadStreams, FmaF32, DotInt8, DotBf16, TileInt8, TileBf16 };

/// Measures the machine, not a model: what a loop of nothing but loads or nothing but
/// multiplications achieves.
struct ProbeArgs {
  ProbeKind kind;
  const void* data;    // ReadStreams: [blocks * kProbeBlockBytes]
  int streams;         // ReadStreams: 1, 2 or 4
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

/// How one layer's keys and values lie in a page of the KV cache. Page p starts at base + p *
/// page_stride; in it kv head h starts at h * head_bytes and holds its keys, then (at value_offset)
/// its values:
///
///   F32   keys [head_dim][page_tokens]         values [page_tokens][head_dim]
///   BF16  keys [page_tokens / 32][key_dims / 2][32][2]  values [page_tokens / 2][head_dim][2]
///   I8    the same, then (at scale_offset) the float32 scales of the keys [page_tokens] and of the
///         values [page_tokens]
///
/// Keys thus lie in the lanes of q k^T and dims in the lanes of p v, and nothing needs a sum over
/// lanes. The pairs of the bf16 layout (two dims of a key, two keys of a dim) make 16 rows of 16
/// pairs a B operand of tdpbf16ps, and widen to float32 with a shift and a mask. key_dims is
/// head_dim rounded up to 32, the depth of a tile; the keys' dims from head_dim on are zero. 32
/// keys or values lie together, so that they are read in the order of their addresses. I8 holds
/// code = round(x / scale) with scale = max|x| / 127 over a token's key or value.
struct KvGeometry {
  int64_t page_tokens;  // multiple of 32
  int64_t num_kv_heads;
  int64_t head_dim;      // multiple of 16
  int64_t head_bytes;    // of one kv head within a page
  int64_t value_offset;  // bytes
  int64_t scale_offset;  // bytes; I8 only
  DType dtype;           // F32 | BF16 | I8
};

/// Consecutive tokens that go to one page.
struct KvAppendItem {
  char* page;
  int64_t token;  // first row of k and v
  int64_t slot;   // first slot of the page
  int64_t count;  // tokens
};

struct KvAppendArgs {
  const float *k, *v;  // [tokens, num_kv_heads, head_dim]
  int64_t k_stride, k_head_stride, v_stride, v_head_stride;
  const KvAppendItem* items;
  const float* key_scale;  // [num_kv_heads, head_dim] what keys are divided by, or null
  KvGeometry kv;
};

/// Query rows of one item at most. A row is one head of one token; rows that share a kv head are
/// numbered token * (heads per kv head) + head within the group.
constexpr int kAttentionRows = 32;
/// The keys of a row are cut at the multiples of this into parts that can be computed apart and are
/// then merged in order.
constexpr int kAttentionPart = 1024;
constexpr int kAttentionMaxHeadDim = 256;
/// Scratch of one thread.
constexpr int64_t kAttentionScratchBytes = kAttentionRows * (32 * kAttentionMaxHeadDim + 2048);

/// Rows of one sequence and kv head against a range of parts.
struct AttentionItem {
  const int32_t* page_table;
  int64_t token;     // the sequence's first row of q and out in this step
  int64_t position;  // of that row in its sequence
  int64_t first_row;
  int32_t rows;  // 1 .. kAttentionRows
  int32_t kv_head;
  int32_t part_begin, part_end;
  /// Null: the item has all parts and writes out. Else each part leaves its rows' maxima, sums and
  /// unnormalised outputs, twice [kAttentionRows] and [rows, head_dim], for attention_merge; more
  /// than 16 rows have room for kAttentionRows.
  float* partial;
  int64_t partial_stride;  // floats between parts
};

struct AttentionArgs {
  float* out;      // [tokens, num_heads, head_dim]
  const float* q;  // [tokens, num_heads, head_dim]
  int64_t out_stride, out_head_stride, q_stride, q_head_stride;
  int64_t group;             // heads per kv head
  const char* base;          // of the page pool
  int64_t page_stride;       // bytes
  float scale;               // > 0
  int64_t window;            // 0 = all
  const float* query_scale;  // [tokens], or null
  const float* key_scale;    // [num_kv_heads, head_dim] what keys were divided by, or null
  const AttentionItem* items;
  KvGeometry kv;
};

/// Queries and keys that training's attention takes at a time.
constexpr int64_t kPackedBlock = 64;

constexpr int64_t packed_length(int64_t length) {
  return (length + kPackedBlock - 1) / kPackedBlock * kPackedBlock;
}
/// head_dim up to whole tiles.
constexpr int64_t packed_depth(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

/// Scratch bytes of one thread for documents up to `length` tokens.
constexpr int64_t packed_attention_scratch(int64_t length, int64_t head_dim) {
  const int64_t depth = packed_depth(head_dim), rows = packed_length(length);
  return 4 * (depth * (2 * rows + 32) + 2 * depth * kPackedBlock +
              2 * kPackedBlock * kPackedBlock) +
         1024;
}
constexpr int64_t packed_attention_bwd_scratch(int64_t length, int64_t head_dim) {
  const int64_t depth = packed_depth(head_dim), rows = packed_length(length);
  return 4 * (depth * (5 * rows + 32) + 5 * depth * kPackedBlock +
              5 * kPackedBlock * kPackedBlock) +
         2048;
}

/// Elements between tokens and between heads.
struct PackedStrides {
  int64_t token, head;
};

/// One query head of one document.
struct PackedAttentionItem {
  int64_t token, length, head;
};

/// Attention over whole documents and its gradients; the first block is all that the forward pass
/// takes.
struct PackedAttentionArgs {
  void* out;          // [tokens, num_heads, head_dim]
  float* lse;         // [num_heads, tokens]: log2(sum(exp(scale * q k^T)))
  const void* q;      // [tokens, num_heads, head_dim]
  const void *k, *v;  // [tokens, num_kv_heads, head_dim]
  PackedStrides out_strides, q_strides, k_strides, v_strides;
  int64_t tokens, num_kv_heads, group, head_dim;  // group: heads per kv head
  int64_t window;                                 // 0 = all
  float scale;
  DType dtype;  // of all but lse and the shares: F32 | BF16
  const PackedAttentionItem* items;

  const void* dout;            // like out
  void* dq;                    // like q
  void *dk, *dv;               // like k
  float *dk_share, *dv_share;  // [num_heads, tokens, head_dim], what each query head adds
  PackedStrides dout_strides, dq_strides, dk_strides, dv_strides;
};

/// Block sizes of matmul: rows of A whose packed operands stay, depth of one pass over them,
/// columns of B at most.
constexpr int64_t kMatmulRows = 1024;
constexpr int64_t kMatmulRowsInOnePass = 8192;
constexpr int64_t kMatmulDepth = 1024;
constexpr int64_t kMatmulColumns = 512;
/// Depth for which A is packed at once.
constexpr int64_t kMatmulPackedDepth = 8192;

/// A block of rows and of depth of out (+)= A B + bias, bf16 in 32 x 32 blocks of tiles.
struct MatmulArgs {
  void* out;         // [m, n]
  const bf16* a;     // [m, k], or [k, m] with a_transposed
  const bf16* b;     // [k, n], or [n, k] with b_transposed
  const bf16* bias;  // [n] or null
  int64_t m, n, k;
  int64_t out_stride, a_stride, b_stride;  // elements between rows
  int64_t first_row, rows;                 // of this block
  int64_t first_depth, depth;
  int64_t columns;  // of a unit of work, a multiple of 32
  bf16* packed_a;   // [ceil(rows / 32)][ceil(depth / 32)][2][16][32]
  float* partial;   // sums of the depth before, [units][ceil(rows / 32)][columns / 32][4][16][16],
                    // or null where this block has all of it
  DType dtype;      // of out: F32 | BF16
  bool a_transposed, b_transposed;
  bool add;  // out += instead of out =
};

/// Scratch bytes of one thread; `rows` as many as have sums to keep from pass to pass.
constexpr int64_t matmul_scratch(int64_t rows, int64_t columns) {
  return kMatmulDepth * columns * 2 + (rows + 31) / 32 * 32 * columns * 4 + 8192;
}

/// Activations as int8 in groups of 32 columns, in blocks of 16 tokens (the last one has the rest,
/// n): [block][group][token of the block], so that a group of a few tokens lies together and one
/// token is a plain row.
struct QuantizedActivations {
  int8_t* codes;  // 32 per element
  float* scale;
  int32_t* negative_sum;  // -(sum of the codes)
  float* scaled_sum;      // scale * sum of the codes
  int64_t tokens;
};

struct QuantizeActivationsArgs {
  QuantizedActivations out;
  const float* x;  // [tokens, cols]
  int64_t cols;
  int64_t x_stride;  // elements between rows
};

/// out = x W^T + bias, or += with `add`. Arrays of x are readable for 16 more elements than they
/// have.
struct GemmQuantizedArgs {
  float* out;          // [tokens, rows]
  const void* weight;  // panels, see quant_layout.h
  const float* bias;   // [rows] or null
  void* scratch;       // of the calling thread, gemm_quantized_scratch bytes, 64-byte aligned
  QuantizedActivations x;
  int64_t rows, cols;
  int64_t out_stride;  // elements between rows
  WeightFormat format;
  bool add;
  int streams;  // memory_streams(): how few tokens walk the panels; changes no result
};

/// Activations as int8 with one scale per token and block of columns, for weights with one scale
/// per row. In tiles of 16 tokens x 64 columns, [ceil(tokens / 16)][ceil(cols / 64)][16][64]; the
/// last tiles have the rest of the tokens only, so that a single token is a plain row. Missing
/// columns are zeros. Readable for a tile more than there are codes.
struct FoldedActivations {
  int8_t* codes;
  float* scale;           // [tokens][blocks(cols)]
  int32_t* negative_sum;  // [tokens][blocks(cols)], -(sum of the codes)
  int16_t* group_sums;    // [tokens][ceil(cols / 64)][2], sums of 32 codes; level avx2 only
  int64_t tokens;
  int64_t block_cols;  // a multiple of 64

  constexpr int64_t blocks(int64_t cols) const { return (cols + block_cols - 1) / block_cols; }
};

struct FoldActivationsArgs {
  FoldedActivations out;
  const float* x;  // [tokens, cols]
  int64_t cols;
  int64_t x_stride;  // elements between rows
};

/// out = x W^T + bias, or += with `add`; Int8 weights, or 4-bit ones rounded to int8 per row. Work
/// is numbered [chunk of chunk_tokens tokens][panel]; gemm_int8, which takes all tokens as one
/// chunk, has panels.
struct GemmFoldedArgs {
  float* out;          // [tokens, rows]
  const void* weight;  // panels of Int8 or a 4-bit format, see quant_layout.h
  const float* bias;   // [rows] or null
  void* scratch;       // of the calling thread, 64-byte aligned; gemm_folded only
  FoldedActivations x;
  int64_t rows, cols;
  int64_t out_stride;    // elements between rows
  int64_t chunk_tokens;  // a multiple of 32
  WeightFormat format;
  bool add;
  int streams;  // memory_streams(): how gemm_int8 walks the panels; changes no result
};

struct GatedWeight {
  const void* data;  // panels of Int8 or a 4-bit format
  WeightFormat format;
};

/// out = silu(x gate^T) * (x up^T). Work is [chunk of chunk_tokens tokens][block of out]: the first
/// whole_units of these are a unit each, the others are cut along their tokens into `pieces` units.
struct GatedGemmFoldedArgs {
  FoldedActivations out;  // [tokens, rows], block_cols a multiple of 64
  GatedWeight gate, up;   // [rows, cols]
  void* scratch;          // of the calling thread, 64-byte aligned
  FoldedActivations x;    // [tokens, cols]
  int64_t rows, cols;
  int64_t chunk_tokens;  // a multiple of 32
  int64_t whole_units, pieces;
};

struct DecodeSourceArgs {
  void* out;         // [rows, cols] f32|bf16
  const void* data;  // [rows] rows of the source's blocks, any alignment
  int64_t cols;      // a whole number of blocks
  int64_t out_stride;
  SourceType source;
  DType dtype;  // of out
};

struct RepackArgs {
  void* out;         // [panels]
  const void* data;  // [rows] rows of the source's blocks, any alignment
  int64_t rows, cols;
  SourceType source;
  WeightFormat format;
  int64_t* rejected;  // lowered to the first row with an infinite or NaN scale
};

struct QuantizeArgs {
  void* out;       // [panels]
  const float* x;  // [rows, cols]
  int64_t rows, cols, x_stride;
  WeightFormat format;
  float* scratch;     // [2, groups, kPanelRows], Int4 only
  float largest;      // greatest |x| that the format can hold
  int64_t* rejected;  // lowered to the first row with an element beyond that, or NaN
};

}  // namespace qn
