// The GPU's half of the ops that the network consists of. Each op hands over here in one place.
#pragma once
#include "kernels/args.h"
#include "kernels/cuda/gemm_layout.h"
#include "kernels/cuda/library.h"
#include "ops/ops.h"

namespace qn::ops::cuda {

inline bool is_dense(WeightFormat format) { return format == WeightFormat::BF16; }
inline int bits_of(WeightFormat format) {
  return is_dense(format) ? 16 : format == WeightFormat::Int4Symmetric ? 4 : 8;
}
/// Columns that share a scale; Int8 has one scale per row.
inline int64_t group_size(const WeightView& weight) {
  return weight.format == WeightFormat::Int8 ? weight.cols : kGroupSize;
}
inline int64_t code_bytes(WeightFormat format, int64_t rows, int64_t cols) {
  return qn::cuda::packed_tiles(rows) * qn::cuda::packed_tiles(cols) *
         qn::cuda::packed_tile_bytes(bits_of(format));
}
/// Where the scales of a packed weight begin, behind its codes.
inline const char* scales_of(const WeightView& weight) {
  return static_cast<const char*>(weight.data) +
         code_bytes(weight.format, weight.rows, weight.cols);
}

inline const qn::cuda::Device& device_of(const Gpu& gpu) {
  return static_cast<const qn::cuda::Device&>(gpu);
}

inline const qn::cuda::Launchers& launchers(const ExecContext& context) {
  return device_of(*context.gpu).launchers();
}

/// Elements between the rows of a matrix that the GEMMs copy in chunks of 16 bytes; throws when
/// its rows are none, or when they do not have `dtype`.
int64_t chunked_rows(const char* op, const char* name, const TensorView& matrix, DType dtype);
/// Runs one of them, with the scratch memory that its plan needs; throws unless `out` is aligned.
void run_gemm(const char* op, decltype(&::qn_cuda_gemm_bf16) gemm, qn::cuda::GemmArgs args,
              const ExecContext& context);

void rms_norm(const RmsNormArgs& args, int64_t rows, const ExecContext& context);
void swiglu(const SwigluArgs& args, int64_t tokens, const ExecContext& context);
void gather(const TensorView& out, const TensorView& ids, const WeightView& table,
            const ExecContext& context);
void linear(const TensorView& out, const TensorView& x, std::span<const LinearSegment> segments,
            Epilogue epilogue, bool invariant, const ExecContext& context);
void append_qkv(const TensorView& qkv, const QkvTransform& transform, const KvLayer& layer,
                const Batch& batch, const ExecContext& context);
void attention(const TensorView& out, const TensorView& q, const KvLayer& layer, const Batch& batch,
               float scale, int64_t window, const ExecContext& context);

// Training's; the arguments are checked but for what only their kernels ask.
void rms_norm_bwd(const RmsNormBwdArgs& args, const ExecContext& context);
void rope(const RopeArgs& args, int64_t tokens, const ExecContext& context);
void swiglu_bwd(const SwigluBwdArgs& args, int64_t tokens, const ExecContext& context);
void softmax_xent(const SoftmaxXentArgs& args, int64_t rows, const ExecContext& context);
/// Shapes are checked; a is [m, k], b [k, n].
void matmul(const TensorView& out, const TensorView& a, bool a_transposed, const TensorView& b,
            bool b_transposed, const TensorView* bias, bool add, const ExecContext& context);
void adamw(const AdamwArgs& args, const ExecContext& context);
void packed_attention(const TensorView& out, const TensorView& lse, const TensorView& q,
                      const TensorView& k, const TensorView& v, const TensorView& cu_seqlens,
                      const PackedAttentionOptions& options, const ExecContext& context);
void packed_attention_bwd(const TensorView& dq, const TensorView& dk, const TensorView& dv,
                          const PackedAttentionPass& pass, const PackedAttentionOptions& options,
                          const ExecContext& context);

}  // namespace qn::ops::cuda
