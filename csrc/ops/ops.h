// Every op of the engine: checks its tensors, picks the kernel of the active level, splits the work
// over threads. Destination first; `f32|bf16` means either. Shape or dtype mistakes throw
// ArgumentError.
//
// The ops of the network also run on a GPU: with context.gpu their tensors, weights and cache lie
// in its memory, activations are bf16 (where f32 is stated below), weights have the GPU's layout
// (ops/gpu.h), and work is queued.
#pragma once
#include <cstdint>
#include <span>
#include <string_view>

#include "core/context.h"
#include "core/tensor.h"
#include "kernels/quant_layout.h"

namespace qn::ops {

/// out = x / sqrt(mean(x^2, last axis) + eps) * weight. With `residual` (same shape as x): residual
/// += x first, and the norm is taken of the sum. out may be x.
///   out, x, residual [rows, cols] f32|bf16, last axis dense; weight [cols] f32|bf16
void rms_norm(const TensorView& out, const TensorView& x, const TensorView& weight, float eps,
              const TensorView* residual, const ExecContext& context);

/// The gradients of rms_norm. With n = 1 / sqrt(mean(x^2) + eps) and g = dy * weight:
///   dx = n * (g - x * n^2 * mean(g * x)) + residual_grad, dweight = sum over the rows of dy * x *
///   n
/// After a norm with a residual, x is the sum and residual_grad the sum's other gradient. The order
/// of the summation over the rows depends on their number alone.
///   dx, dy, x, residual_grad [rows, cols] f32|bf16, last axis dense; weight, dweight [cols]
///   f32|bf16
void rms_norm_bwd(const TensorView& dx, const TensorView& dweight, const TensorView& dy,
                  const TensorView& x, const TensorView& weight, float eps,
                  const TensorView* residual_grad, const ExecContext& context);

/// Rotates the pairs (i, i + rope_dim / 2) of every head in place: (a, b) -> (a cos - b sin, b cos
/// + a sin). Elements from rope_dim on stay as they are.
///   x [tokens, heads, head_dim] f32|bf16, last axis dense; cos, sin [tokens, rope_dim / 2] f32
void rope(const TensorView& x, const TensorView& cos, const TensorView& sin,
          const ExecContext& context);

/// out = gate * sigmoid(gate) * up.
///   out, gate, up [tokens, inter] f32|bf16, last axis dense; out may be gate or up
void swiglu(const TensorView& out, const TensorView& gate, const TensorView& up,
            const ExecContext& context);

/// The gradients of swiglu: with s = sigmoid(gate), dup = dout * gate * s and
/// dgate = dout * up * s * (1 + gate * (1 - s)).
///   all [tokens, inter] f32|bf16, last axis dense; dgate and dup may be dout, gate or up
void swiglu_bwd(const TensorView& dgate, const TensorView& dup, const TensorView& dout,
                const TensorView& gate, const TensorView& up, const ExecContext& context);

/// log_prob[r] = log(softmax(scale * logits[r]))[targets[r]], 0 where the target is -1. With `grad`
/// (the gradient of log_prob) the logits are replaced by their gradient,
/// grad[r] * scale * (one_hot(targets[r]) - softmax(scale * logits[r])), zeros where there is no
/// target.
///   log_prob, grad [rows] f32; logits [rows, vocab] f32|bf16, last axis dense; targets [rows] i32
void softmax_xent(const TensorView& log_prob, const TensorView& logits, const TensorView& targets,
                  float scale, const TensorView* grad, const ExecContext& context);

/// Sum of x^2 over all elements: float32 within blocks of 4096, float64 over them.
///   x f32|bf16, dense
double squared_norm(const TensorView& x, const ExecContext& context);

struct AdamwOptions {
  int64_t step;  // from 1
  double rate, beta1, beta2, eps, weight_decay;
  double grad_scale;  // of the gradient, before all else
};

/// One step of AdamW (arXiv 1711.05101), g = grad_scale * grad:
///   mean = beta1 mean + (1 - beta1) g, square = beta2 square + (1 - beta2) g^2,
///   master -= rate * (weight_decay * master + mean / c1 / (sqrt(square / c2) + eps)),
/// with c = 1 - beta^step; then parameter = master, rounded.
///   master, mean, square f32, grad f32|bf16, parameter bf16 or null; all dense and of one shape
void adamw(const TensorView& master, const TensorView& mean, const TensorView& square,
           const TensorView& grad, const TensorView* parameter, const AdamwOptions& options,
           const ExecContext& context);

/// out[t] = row ids[t] of the table, dequantised. Ids outside [0, table.rows) throw.
///   out [tokens, table.cols] f32; ids [tokens] i32
void gather(const TensorView& out, const TensorView& ids, const WeightView& table,
            const ExecContext& context);

/// "f32", "bf16", "int8", "int8_grouped", "int4_symmetric", "int4".
const char* weight_format_name(WeightFormat format);
WeightFormat weight_format_from_name(std::string_view name);

/// ggml's names: "F32", "F16", "BF16", "Q4_0" .. "Q6_K".
const char* source_type_name(SourceType source);
SourceType source_type_from_name(std::string_view name);

/// Bytes of a weight in `format`.
size_t weight_bytes(WeightFormat format, int64_t rows, int64_t cols);

/// Bytes of a tensor in a checkpoint; throws when cols is not a whole number of the type's blocks.
size_t source_bytes(SourceType source, int64_t rows, int64_t cols);

/// Packs rows [0, rows) of a checkpoint tensor into `out` (weight_bytes). Conversions that can be
/// exact are: Q8_0, Q5_0 and Q4_0 to Int8Grouped, Q4_0 to Int4Symmetric, everything to F32, BF16 to
/// BF16.
/// The others minimise the squared error by a search over scales.
void pack_weight(void* out, WeightFormat format, int64_t rows, int64_t cols, SourceType source,
                 const void* data, const ExecContext& context);

/// Decodes a checkpoint tensor to float32: out [rows, cols].
void decode_source(float* out, int64_t rows, int64_t cols, SourceType source, const void* data,
                   const ExecContext& context);

/// Decodes a packed weight to float32: out [rows, cols].
void unpack_weight(float* out, const WeightView& weight, const ExecContext& context);

/// One weight of a linear layer; its result goes to columns [out_offset, out_offset + weight.rows)
/// of out.
struct LinearSegment {
  WeightView weight;
  const void* bias;  // [weight.rows] of the activations' dtype, or null
  int64_t out_offset;
};

enum class Epilogue : uint8_t {
  Store,  // out = x W^T + bias
  Add,    // out += x W^T + bias (the residual stream)
};

/// From this many tokens on, 4-bit weights take the folded kernel, where the active level has one,
/// unless `invariant` is asked for. The number depends on the level and on memory_streams.
int64_t folded_tokens();

/// Segments share x, which is quantised or converted once, and one parallel region. All segments
/// have cols = x's cols. For F32, BF16 and the 8-bit formats the result of a row does not depend on
/// the other rows, on `tokens` or on the number of threads, bit for bit; for the 4-bit formats that
/// holds with `invariant`, without it batches of folded_tokens() and more take a faster kernel that
/// rounds weights and activations to 8 bits per row.
///   out [tokens, >= sum of rows] f32, x [tokens, cols] f32, last axes dense
void linear(const TensorView& out, const TensorView& x, std::span<const LinearSegment> segments,
            Epilogue epilogue, bool invariant, const ExecContext& context);

/// The matrices of a gated MLP: gate and up [inter, hidden], down [hidden_out, inter].
struct MlpWeights {
  WeightView gate, up, down;
};

/// out += (silu(x gate^T) * (x up^T)) down^T. With Int8 or 4-bit weights and larger batches the
/// inner activations never leave 8 bits (see linear; `invariant` keeps the exact arithmetic of the
/// 4-bit formats; that of Int8 is the same either way).
///   out [tokens, hidden_out] f32, x [tokens, hidden] f32, last axes dense
void mlp(const TensorView& out, const TensorView& x, const MlpWeights& weights, bool invariant,
         const ExecContext& context);

/// One layer's share of the paged KV cache. Page p of the pool starts at base + p * page_stride and
/// holds the keys, then the values, of `page_tokens` tokens for every kv head (csrc/kernels/args.h
/// gives the layout inside).
struct KvLayer {
  void* base;
  int64_t page_stride;  // bytes
  int64_t page_tokens;
  int64_t num_kv_heads, head_dim;
  DType dtype;  // F32 | BF16 | I8
  /// I8 only: [num_kv_heads, head_dim] positive factors that keys are divided by before they are
  /// rounded, and queries multiplied with, or null. They keep a channel that is large in every key
  /// from taking the precision of the others.
  const float* key_scale = nullptr;
};

/// Bytes of one page of one layer.
size_t kv_page_bytes(int64_t page_tokens, int64_t num_kv_heads, int64_t head_dim, DType dtype);
/// The rows of one sequence within a step's batch.
struct SequenceSpan {
  int64_t query_begin;        // its first row in q, k, v and out
  int64_t query_count;        // its rows, consecutive positions that end at kv_len
  int64_t kv_len;             // tokens in the cache once this step's rows have been appended
  const int32_t* page_table;  // [ceil(kv_len / page_tokens)] page numbers
};

/// What a step's tokens are. Tensors lie where the step runs, spans always on the host.
struct Batch {
  TensorView token_ids;    // i32 [tokens]
  TensorView cos, sin;     // f32 [tokens, rope_dim / 2]
  TensorView query_scale;  // f32 [tokens] extra factor of each query (LogN), or no data
  TensorView output_rows;  // i32 [rows], the tokens whose final hidden state is wanted
  std::span<const SequenceSpan> spans;  // cover the tokens in order

  /// A GPU's only: what its kernels read instead of `spans`. The first `decoding` sequences have
  /// one token each.
  struct OnGpu {
    const int32_t *positions, *slots;    // [tokens]
    const int32_t *page_table, *kv_len;  // [sequences, page_table_stride], [sequences]
    const int32_t* query_begin;          // [sequences + 1]
    int64_t sequences, decoding, page_table_stride, max_query_len, max_kv_len;
  } gpu{};

  int64_t tokens() const { return token_ids.shape[0]; }
};

/// Writes k and v of every span's rows to their slots in the cache. A page's unused slots are
/// zeroed when its first slot is written, so that stale values (or NaN) of an earlier owner cannot
/// leak through a masked position.
///   k, v [tokens, num_kv_heads, head_dim] f32, last axis dense
void kv_append(const KvLayer& layer, const TensorView& k, const TensorView& v,
               std::span<const SequenceSpan> spans, const ExecContext& context);

struct AttentionOptions {
  float scale;               // of the dot products, usually 1 / sqrt(head_dim)
  int64_t window;            // keys that a query sees, itself included; 0 = all before it
  const float* query_scale;  // [tokens] extra factor of each query (LogN), or null
};

/// Causal softmax(scale * q k^T) v over the cache. The row at position p of its sequence sees the
/// keys max(0, p + 1 - window) .. p. Heads share kv heads in consecutive groups. The result of a
/// row depends on its own query and keys only, bit for bit: not on the batch, the chunk it came in,
/// or the number of threads.
///   out, q [tokens, num_heads, head_dim] f32, last axis dense
void attention(const TensorView& out, const TensorView& q, const KvLayer& layer,
               std::span<const SequenceSpan> spans, const AttentionOptions& options,
               const ExecContext& context);

/// attention() with the batch's spans and query_scale (on a GPU append_qkv has applied it).
void attention(const TensorView& out, const TensorView& q, const KvLayer& layer, const Batch& batch,
               float scale, int64_t window, const ExecContext& context);

/// What happens to queries and keys before RoPE; no data: nothing. q_norm and k_norm are the
/// weights of an RMSNorm of every head. Vectors have the activations' dtype.
struct QkvTransform {
  TensorView bias;            // [(num_heads + 2 num_kv_heads) head_dim], a GPU's only
  TensorView q_norm, k_norm;  // [head_dim]
  float eps;
};

/// Everything between the projection to queries, keys and values and attention(): the transform,
/// RoPE of queries and keys in place, keys and values into the cache.
///   qkv [tokens, (num_heads + 2 num_kv_heads) head_dim] f32
void append_qkv(const TensorView& qkv, const QkvTransform& transform, const KvLayer& layer,
                const Batch& batch, const ExecContext& context);

struct PackedAttentionOptions {
  float scale;     // of the dot products
  int64_t window;  // keys that a query sees, itself included; 0 = all before it
};

/// Causal attention within each document of a flat batch, for training: out = softmax(scale q k^T)
/// v and lse = log2(sum(exp(scale q k^T))). Document d has the tokens cu_seqlens[d] to cu_seqlens[d
/// + 1]; heads share kv heads in consecutive groups. Results do not depend on the other documents
/// or on the number of threads, bit for bit.
///   out, q [tokens, num_heads, head_dim], k, v [tokens, num_kv_heads, head_dim] f32|bf16, last
///   axis dense, head_dim at most 256; lse [num_heads, tokens] f32; cu_seqlens [documents + 1] i32
void packed_attention(const TensorView& out, const TensorView& lse, const TensorView& q,
                      const TensorView& k, const TensorView& v, const TensorView& cu_seqlens,
                      const PackedAttentionOptions& options, const ExecContext& context);

/// What the gradients are computed from: the inputs and results of packed_attention, and the
/// gradient of out.
struct PackedAttentionPass {
  const TensorView &dout, &q, &k, &v, &out, &lse, &cu_seqlens;
};

/// The gradients of packed_attention; dq like q, dk and dv like k.
void packed_attention_bwd(const TensorView& dq, const TensorView& dk, const TensorView& dv,
                          const PackedAttentionPass& pass, const PackedAttentionOptions& options,
                          const ExecContext& context);

/// Whether the active level has matmul.
bool has_matmul();

/// out = a b + bias, or += with `add`: bf16 products, float32 sums in ascending order of k, one
/// rounding. Operands may be stored transposed: a [k, m], b [n, k]. An element depends on its row
/// of a and column of b alone, bit for bit.
///   out [m, n] f32|bf16; a [m, k], b [k, n], bias [n] (or null) bf16; last axes dense
void matmul(const TensorView& out, const TensorView& a, bool a_transposed, const TensorView& b,
            bool b_transposed, const TensorView* bias, bool add, const ExecContext& context);

/// About what one more token adds to the time of linear with one token and quantised weights, as a
/// share of it, at the active level and with these memory_streams.
double token_cost();

/// Index of the largest element, the first one of equals. NaN never wins; throws Error when there
/// is nothing but NaN.
///   x [n] f32, n > 0
int64_t argmax(const TensorView& x, const ExecContext& context);

/// log(sum(exp(x))): within half an ulp of the result plus 2^-22, the same bits for any number of
/// threads. NaN when x has a NaN, otherwise +inf when it has +inf; -inf when all elements are -inf.
/// May be called inside a parallel region.
///   x [n] f32, n > 0
float log_sum_exp(const TensorView& x, const ExecContext& context);

/// Elements that one partial result of block_max and block_exp_sum covers.
constexpr int64_t kVocabBlock = 128;

/// out[b] = largest element of block b of x; NaN when the block has a NaN.
///   out [ceil(n / kVocabBlock)] f32, x [n] f32
void block_max(const TensorView& out, const TensorView& x, const ExecContext& context);

/// out[b] = sum over block b of exp((x - shift) * scale).
///   out [ceil(n / kVocabBlock)] f32, x [n] f32
void block_exp_sum(const TensorView& out, const TensorView& x, float shift, float scale,
                   const ExecContext& context);

}  // namespace qn::ops
