// The launchers of the CUDA kernels. Each checks nothing (ops do), queues its kernels on `stream`
// and returns 0 or the error of the launch. C names, so that the simulator's library can be called
// from Python. Activations are bf16 unless an args struct has a dtype; strides count elements.
#pragma once
#include "kernels/args.h"

namespace qn::cuda {

/// Picks launch shapes; filled from the device's properties, or by a test.
struct DeviceInfo {
  int32_t multiprocessors;
};

/// Rows of an embedding table: out[t] = table[ids[t]], NaN where there is no such row.
struct EmbedArgs {
  void* out;           // [tokens, cols] bf16
  const int32_t* ids;  // [tokens]
  const void* table;   // [rows, cols] bf16 dense rows, or packed (gemm_layout.h)
  const void* scales;  // of a packed table
  const void* zeros;   // of a packed table, or null
  int64_t tokens, rows, cols;
  int64_t out_stride;
  int32_t group_size;  // of a packed table
  int32_t bits;        // 16, 8 or 4
};

/// One layer's share of the paged KV cache. Page p starts at base + p * page_stride; in it kv head
/// h starts at h * kv_head_bytes and holds, one after the other,
///   keys [page_tokens][head_dim], values [page_tokens][head_dim]         bf16, or int8 and then
///   key scales [page_tokens], value scales [page_tokens]                 f32, with int8 only
/// An int8 row is code * its scale.
struct KvPages {
  void* base;
  int64_t page_stride;  // bytes, a multiple of 16
  int32_t page_shift;   // page_tokens = 1 << page_shift, 4 .. 10
  int32_t num_kv_heads;
  int32_t head_dim;  // 64, 80, 96 or 128
  int32_t bits;      // 16 (bf16) or 8
};

/// q = rope(norm(qkv + bias)) * query_scale for the query heads; keys likewise, without
/// query_scale, and values (bias only) into the cache. norm is the RMS norm over a head of QK-norm.
struct RopeKvArgs {
  void* q;                      // [tokens, num_heads, head_dim] bf16; may be qkv
  const void* qkv;              // [tokens, num_heads + 2 num_kv_heads, head_dim] bf16
  const void* bias;             // [num_heads + 2 num_kv_heads, head_dim] bf16, or null
  const void *q_norm, *k_norm;  // [head_dim] bf16, or both null
  const float *cos, *sin;       // [positions, head_dim / 2]
  const int32_t* positions;     // [tokens], row of cos and sin
  const float* query_scale;     // [tokens] (LogN), or null
  const float* key_scale;       // [num_kv_heads, head_dim] or null: keys are divided by it, queries
                                // multiplied; the same for the two elements of a pair
  const int32_t* slots;         // [tokens], page * page_tokens + slot; negative: not written
  int64_t tokens;
  int64_t q_stride, qkv_stride;  // elements between tokens, multiples of 8
  int32_t num_heads;
  float eps;
  KvPages kv;
};

/// Causal softmax(scale * q k^T) v over the cache. Sequence s has the rows query_begin[s] ..
/// query_begin[s + 1] - 1 of q and out, the last of them at position kv_len[s] - 1; a row sees the
/// keys up to its own position, the newest `window` of them if window > 0. Unused slots of a page
/// are never read.
struct PagedAttentionArgs {
  void* out;                     // [tokens, num_heads, head_dim] bf16
  const void* q;                 // [tokens, num_heads, head_dim] bf16
  const int32_t* page_table;     // [sequences, page_table_stride] page numbers
  const int32_t* query_begin;    // [sequences + 1]; prefill only: decode has one row per sequence
  const int32_t* kv_len;         // [sequences], this step's tokens included
  float* workspace;              // decode: qn_cuda_attention_decode_workspace bytes
  int64_t q_stride, out_stride;  // elements between tokens, multiples of 8
  int32_t sequences, page_table_stride;
  int32_t max_query_len, max_kv_len;  // at least the largest of the batch
  int32_t num_heads;
  int32_t window;
  float scale;
  KvPages kv;
};

/// Causal attention within documents that lie one after the other, for training, and its
/// gradients. bf16 tensors [tokens, heads, head_dim], the heads of a token side by side; head_dim
/// 64, 80, 96 or 128.
struct DocumentAttentionArgs {
  void* out;              // [tokens, num_heads, head_dim]
  float* lse;             // [num_heads, tokens]: log2(sum(exp(scale * q k^T))); forward: or null
  const void* q;          // [tokens, num_heads, head_dim]
  const void *k, *v;      // [tokens, num_kv_heads, head_dim]
  const int32_t* begins;  // [documents + 1]: document d has the tokens begins[d] .. begins[d + 1]
  const void* dout;       // like out; from here on gradients only
  void* dq;               // like q
  void *dk, *dv;          // like k
  float* delta;           // [num_heads, tokens], scratch
  int64_t tokens;
  // Elements between tokens, multiples of 8.
  int64_t out_stride, q_stride, k_stride, v_stride, dout_stride, dq_stride, dk_stride, dv_stride;
  int32_t documents;
  int32_t max_length;  // at least that of the longest document
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t window;  // a row sees the newest `window` keys, itself included; 0 = all
  float scale;
};

/// Draws one token per row, in the order of csrc/runtime/sampler.h: temperature, top_k, top_p,
/// min_p, with the same counter-based generator. Weights are multiples of 2^-31 of the largest.
struct SampleArgs {
  int32_t* token;       // [rows]; -1 when the logits have NaN or +inf, or nothing but -inf
  float* logprob;       // [rows] log of the probability that the draw gave to its token, or null
  const float* logits;  // [rows, vocab]
  const float* temperature;  // [rows], 0 = greedy: the lowest id of the largest logits
  const float* top_p;        // [rows], 1 = off
  const float* min_p;        // [rows], 0 = off
  const int32_t* top_k;      // [rows], 0 = off; keeps all that equal the k-th
  const uint64_t* seed;      // [rows]
  const uint64_t* index;     // [rows] of the token in its sequence's output
  int64_t rows, vocab;       // vocab at most 2^18
  int64_t stride;            // elements between rows
};

/// out = x W^T (+ bias) (+ residual). All pointers are 16-byte aligned, and so are the rows of x
/// and of a dense weight; cols is a multiple of 8. (Launchers that read otherwise say so.)
struct GemmArgs {
  void* out;             // [tokens, rows] of out_dtype
  const void* x;         // [tokens, cols] bf16
  const void* weight;    // [rows, cols] bf16, or packed (gemm_layout.h)
  const void* scales;    // of a packed weight; float [rows] of gemm_w8a8's
  const void* zeros;     // of a packed 4-bit weight, or null
  const void* bias;      // [rows] bf16, or null
  const void* residual;  // [tokens, rows] bf16, or null; may be out
  float* workspace;      // qn_cuda_gemm_workspace bytes, 16-byte aligned
  int64_t tokens, rows, cols;
  int64_t out_stride, x_stride, weight_stride, residual_stride;  // elements between rows
  int32_t group_size;     // columns that share a scale: 32 times a power of two, or at least cols
  DType out_dtype;        // F32 | BF16
  bool invariant;         // no split along cols: a token's result then never depends on `tokens`
  bool add;               // out += instead of out =
  const float* x_scales;  // [tokens], gemm_w8a8 only, else null
};

/// int8 activations for gemm_w8a8: codes = round(x / scale), scale = max |x| of the token / 127.
struct QuantizeTokensArgs {
  int8_t* codes;                   // [tokens, cols]
  float* scales;                   // [tokens]
  const void* x;                   // [tokens, cols] bf16
  int64_t tokens, cols;            // cols a multiple of 16
  int64_t codes_stride, x_stride;  // elements between tokens
};

/// log_prob[t] = log(softmax(scale * hidden[t] W^T))[targets[t]] and its gradients, for
/// `chunk_tokens` tokens at a time: the logits of more are never there. vocab and cols are
/// multiples of 8, there is at least one token; dtypes are bf16 but where said.
struct LinearXentArgs {
  float* log_prob;         // [tokens]; 0 without a target
  void* dhidden;           // [tokens, cols], or null
  void* dweight;           // [vocab, cols] of dweight_dtype, or null
  const void* hidden;      // [tokens, cols]
  const void* weight;      // [vocab, cols]
  const int32_t* targets;  // [tokens], in [0, vocab), or -1: no target
  const float* grad;       // [tokens] of log_prob, or null: no gradients
  void* workspace;         // qn_cuda_linear_xent_workspace bytes, 16-byte aligned
  int64_t tokens, vocab, cols, chunk_tokens;
  int64_t hidden_stride, weight_stride, dhidden_stride, dweight_stride;
  float scale;          // of the logits
  DType dweight_dtype;  // F32 | BF16; in BF16 every chunk's sum is rounded
};

/// A weight, or some of its rows, from the CPU's order to the GEMMs'.
struct RepackTilesArgs {
  const void* source;  // rows [first_row, first_row + rows), as quant_layout.h packs them
  void* codes;         // of the whole weight (gemm_layout.h)
  void* scales;        // of the whole weight; Int8 has one group, the others groups of 32 columns
  int64_t first_row;   // a multiple of 64
  int64_t rows, cols;
  int64_t total_rows;
  WeightFormat format;  // Int8, Int8Grouped or Int4Symmetric
};

/// How a GEMM is launched. Work is counted in units of one tile x 64 columns, ordered by tile, and
/// each of the thread blocks takes an equal run of units ("stream-K"); a tile that several blocks
/// share is summed, in their order, by a second kernel. No atomics: a
/// result is reproducible.
struct GemmPlan {
  int32_t tile_tokens;  // 16, 64 or 128
  int32_t token_tiles, row_tiles, col_tiles;
  int32_t blocks;
  int32_t groups;       // of columns, of a packed weight
  int32_t scale_shift;  // a group has 2^scale_shift stages of 64 columns
  bool split;           // some tile is shared
};

}  // namespace qn::cuda

#pragma GCC visibility push(default)
extern "C" {
int qn_cuda_rope(const qn::cuda::RopeKvArgs* args, void* stream);
int qn_cuda_attention_prefill(const qn::cuda::PagedAttentionArgs* args, void* stream);
int qn_cuda_attention_decode(const qn::cuda::PagedAttentionArgs* args, void* stream);
int64_t qn_cuda_attention_decode_workspace(const qn::cuda::PagedAttentionArgs* args);
int qn_cuda_packed_attention(const qn::cuda::DocumentAttentionArgs* args, void* stream);
int qn_cuda_packed_attention_bwd(const qn::cuda::DocumentAttentionArgs* args, void* stream);
int qn_cuda_rms_norm(const qn::RmsNormArgs* args, int64_t rows, void* stream);
/// cols at most 8192; partial is 16-byte aligned.
int qn_cuda_rms_norm_bwd(const qn::RmsNormBwdArgs* args, void* stream);
/// RoPE in place, without a cache; with `inverse` by the negative angles, which is its gradient.
int qn_cuda_rope_pairs(const qn::RopeArgs* args, int64_t tokens, bool inverse, void* stream);
int qn_cuda_sampling(const qn::cuda::SampleArgs* args, void* stream);
int qn_cuda_softmax_xent(const qn::SoftmaxXentArgs* args, int64_t rows, void* stream);
int qn_cuda_linear_xent(const qn::cuda::LinearXentArgs* args, const qn::cuda::DeviceInfo* device,
                        void* stream);
int64_t qn_cuda_linear_xent_workspace(const qn::cuda::LinearXentArgs* args,
                                      const qn::cuda::DeviceInfo* device);
int qn_cuda_swiglu(const qn::SwigluArgs* args, int64_t tokens, void* stream);
int qn_cuda_swiglu_bwd(const qn::SwigluBwdArgs* args, int64_t tokens, void* stream);
int qn_cuda_adamw(const qn::AdamwArgs* args, void* stream);
int qn_cuda_gemm_bf16(const qn::cuda::GemmArgs* args, const qn::cuda::DeviceInfo* device,
                      void* stream);
/// out = x W with weight [cols, rows] as it lies, for the gradient of a layer's input; rows is a
/// multiple of 8.
int qn_cuda_gemm_input_grad(const qn::cuda::GemmArgs* args, const qn::cuda::DeviceInfo* device,
                            void* stream);
/// out = x^T W with x [cols, tokens] and weight [cols, rows], for the gradient of a layer's weight;
/// tokens and rows are multiples of 8, cols may be any number.
int qn_cuda_gemm_weight_grad(const qn::cuda::GemmArgs* args, const qn::cuda::DeviceInfo* device,
                             void* stream);
/// x [tokens, cols] int8 with x_scales, weight [rows, cols] int8 with one float of `scales` per
/// row; cols is a multiple of 16.
int qn_cuda_gemm_w8a8(const qn::cuda::GemmArgs* args, const qn::cuda::DeviceInfo* device,
                      void* stream);
int qn_cuda_quantize_tokens(const qn::cuda::QuantizeTokensArgs* args, void* stream);
int qn_cuda_gemm_int8(const qn::cuda::GemmArgs* args, const qn::cuda::DeviceInfo* device,
                      void* stream);
int qn_cuda_gemm_int4(const qn::cuda::GemmArgs* args, const qn::cuda::DeviceInfo* device,
                      void* stream);
/// Fills plan for any of them.
void qn_cuda_gemm_plan(const qn::cuda::GemmArgs* args, const qn::cuda::DeviceInfo* device,
                       qn::cuda::GemmPlan* plan);
/// Bytes of GemmArgs::workspace that a plan needs, 0 without a split.
int64_t qn_cuda_gemm_workspace(const qn::cuda::GemmPlan* plan);
int qn_cuda_gather(const qn::cuda::EmbedArgs* args, void* stream);
int qn_cuda_repack(const qn::cuda::RepackTilesArgs* args, void* stream);
}
#pragma GCC visibility pop
