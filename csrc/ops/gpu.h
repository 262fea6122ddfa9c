// What is on a GPU only: its layouts of weights and cache, the inputs of a step in its memory, the
// draw of tokens there, and ops that the CPU has otherwise or not at all.
#pragma once
#include <memory>
#include <span>
#include <string>

#include "core/gpu.h"
#include "ops/ops.h"

namespace qn::ops {

/// Opens the GPU that a library of CUDA kernels drives; throws Error as Gpu does.
std::shared_ptr<const Gpu> open_gpu(const std::string& library);

/// Whether the GPU's kernels can multiply with a weight of this format: BF16, Int8, Int8Grouped,
/// Int4Symmetric.
bool gpu_has_format(WeightFormat format);

/// Bytes of a weight in the GPU's layout; WeightView::data is its start.
size_t gpu_weight_bytes(WeightFormat format, int64_t rows, int64_t cols);

/// Queues the rearrangement of rows [first_row, first_row + rows) of `weight`, which lies at
/// `packed` on the GPU in the layout of pack_weight, to weight.data. Quantised formats only;
/// first_row is a multiple of 64.
void repack_weight(const WeightView& weight, int64_t first_row, int64_t rows, const void* packed,
                   const Gpu& gpu);

/// out = x W^T + bias with W = codes * scales: a token of x is rounded to int8 with the scale of
/// its largest element, the products are summed exactly, in int32.
///   out [tokens, rows] bf16|f32, x [tokens, cols] bf16, codes [rows, cols] int8, scales [rows]
///   f32, bias [rows] bf16 or null; cols a multiple of 16
void linear_w8a8(const TensorView& out, const TensorView& x, const TensorView& codes,
                 const TensorView& scales, const TensorView* bias, const ExecContext& context);

struct LinearXentGrads {
  const TensorView* log_prob;  // [tokens] f32: the gradient that comes in
  const TensorView* hidden;    // like hidden, or null
  const TensorView* weight;    // like weight or f32, or null; bf16 is rounded once per chunk
};

/// log_prob[t] = log(softmax(scale * hidden[t] weight^T))[targets[t]], 0 where the target is -1 and
/// NaN where it is not in the vocabulary; with `grads` the gradients too. The logits of more than
/// chunk_tokens tokens are never there.
///   log_prob [tokens] f32; hidden [tokens, cols], weight [vocab, cols] bf16, cols and vocab
///   multiples of 8; targets [tokens] i32
void linear_xent(const TensorView& log_prob, const TensorView& hidden, const TensorView& weight,
                 const TensorView& targets, float scale, const LinearXentGrads* grads,
                 int64_t chunk_tokens, const ExecContext& context);

/// Bytes of one page of one layer's KV cache (kernels/cuda/kernels.h gives the layout): pages of 16
/// to 1024 tokens, a power of two, head_dim 64, 80, 96 or 128, bf16 or int8.
size_t gpu_kv_page_bytes(int64_t page_tokens, int64_t num_kv_heads, int64_t head_dim, DType dtype);

/// Bytes of GpuInputs that upload_batch() takes.
size_t batch_bytes(const Batch& batch, int64_t sequences, int64_t max_kv_len, int64_t page_tokens);

/// Adds a batch to the inputs of a step; send() them before it is used. `sequences` beyond the
/// batch's own, which then have one token each, are filled up with copies of the first that leave
/// the cache as it is; max_kv_len, at least the largest of the batch, fixes the shapes of launches.
Batch upload_batch(const Batch& host, int64_t sequences, int64_t max_kv_len, int64_t page_tokens,
                   GpuInputs& inputs);

/// How one row is drawn from, as in runtime/sampler.h.
struct DrawOptions {
  float temperature = 0, top_p = 1, min_p = 0;
  int32_t top_k = 0;
  uint64_t seed = 0, index = 0;
};

/// Parameters of draw_tokens, in a GPU's memory.
struct DrawInputs {
  const float *temperature, *top_p, *min_p;
  const int32_t* top_k;
  const uint64_t *seed, *index;
};

/// Bytes of GpuInputs that upload_draws() takes.
size_t draw_bytes(int64_t rows);
DrawInputs upload_draws(std::span<const DrawOptions> rows, GpuInputs& inputs);

/// Draws one token per row, on a GPU only: the same draws as the runtime's sampler but for
/// probabilities that differ by rounding. Rows that leave nothing to draw from get token -1.
///   token [rows] i32; log_prob [rows] f32, of the draw; logits [rows, vocab] f32, vocab at most
///   2^18
void draw_tokens(const TensorView& token, const TensorView& log_prob, const TensorView& logits,
                 const DrawInputs& inputs, const ExecContext& context);

}  // namespace qn::ops
