// The GPU's half of the ops that the network consists of. Each op hands over here in one place.
#pragma once
#include "kernels/cuda/gemm_layout.h"
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

void rms_norm(const TensorView& out, const TensorView& x, const TensorView& weight, float eps,
              const TensorView* residual, const ExecContext& context);
void swiglu(const TensorView& out, const TensorView& gate, const TensorView& up,
            const ExecContext& context);
void gather(const TensorView& out, const TensorView& ids, const WeightView& table,
            const ExecContext& context);
void linear(const TensorView& out, const TensorView& x, std::span<const LinearSegment> segments,
            Epilogue epilogue, bool invariant, const ExecContext& context);
void append_qkv(const TensorView& qkv, const QkvTransform& transform, const KvLayer& layer,
                const Batch& batch, const ExecContext& context);
void attention(const TensorView& out, const TensorView& q, const KvLayer& layer, const Batch& batch,
               float scale, int64_t window, const ExecContext& context);

}  // namespace qn::ops::cuda
