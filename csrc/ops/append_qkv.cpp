#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {
namespace {

/// The columns [begin, begin + heads * head_dim) of every row of x, as [tokens, heads, head_dim].
TensorView heads_of(const TensorView& x, int64_t begin, int64_t heads, int64_t head_dim) {
  TensorView view(x.as<float>() + begin, DType::F32, {x.shape[0], heads, head_dim});
  view.stride = {x.stride[0], head_dim, 1, 0};
  return view;
}

/// RMSNorm of every head on its own.
void norm_heads(const TensorView& x, const TensorView& weight, float eps,
                const ExecContext& context) {
  if (weight.data == nullptr) return;
  for (int64_t head = 0; head < x.shape[1]; ++head) {
    TensorView one(x.as<float>() + head * x.stride[1], DType::F32, {x.shape[0], x.shape[2]});
    one.stride[0] = x.stride[0];
    rms_norm(one, one, weight, eps, nullptr, context);
  }
}

}  // namespace

void append_qkv(const TensorView& qkv, const QkvTransform& transform, const KvLayer& layer,
                const Batch& batch, const ExecContext& context) {
  const int64_t head_dim = layer.head_dim, kv_heads = layer.num_kv_heads;
  const int64_t heads = qkv.shape[1] / head_dim - 2 * kv_heads;
  QN_CHECK(qkv.rank == 2 && heads > 0 && qkv.shape[1] == (heads + 2 * kv_heads) * head_dim,
           "[append_qkv] qkv is ", qkv.describe(), ", expected columns for query heads and ",
           2 * kv_heads, " more heads of ", head_dim);
  if (context.gpu != nullptr) return cuda::append_qkv(qkv, transform, layer, batch, context);
  const TensorView q = heads_of(qkv, 0, heads, head_dim);
  const TensorView k = heads_of(qkv, heads * head_dim, kv_heads, head_dim);
  const TensorView v = heads_of(qkv, (heads + kv_heads) * head_dim, kv_heads, head_dim);
  norm_heads(q, transform.q_norm, transform.eps, context);
  norm_heads(k, transform.k_norm, transform.eps, context);
  rope(q, batch.cos, batch.sin, context);
  rope(k, batch.cos, batch.sin, context);
  kv_append(layer, k, v, batch.spans, context);
}

}  // namespace qn::ops
