#include "ops/cuda.h"

#include <bit>

#include "ops/check.h"
#include "ops/gpu.h"

namespace qn::ops {
namespace {

using qn::cuda::KvPages;

KvPages pages_of(const KvLayer& layer) {
  return {layer.base,
          layer.page_stride,
          std::countr_zero(static_cast<uint64_t>(layer.page_tokens)),
          static_cast<int32_t>(layer.num_kv_heads),
          static_cast<int32_t>(layer.head_dim),
          layer.dtype == DType::I8 ? 8 : 16};
}

const TensorView& check_activation(const char* op, const char* name, const TensorView& tensor) {
  QN_CHECK(tensor.dtype == DType::BF16, "[", op, "] ", name, " is ", tensor.describe(),
           ", expected bf16 on a GPU");
  check_dense_rows(op, name, tensor);
  return tensor;
}

void check_format(const char* op, const char* name, const WeightView& weight) {
  QN_CHECK(gpu_has_format(weight.format), "[", op, "] ", name, " is ",
           weight_format_name(weight.format),
           ", expected bf16, int8, int8_grouped or int4_symmetric on a GPU");
}

constexpr int64_t kChunkBytes = 16;  // of one access

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0; }

}  // namespace

void repack_weight(const WeightView& weight, int64_t first_row, int64_t rows, const void* packed,
                   const Gpu& gpu) {
  qn::cuda::RepackTilesArgs args{};
  args.source = packed;
  args.codes = const_cast<void*>(weight.data);
  args.scales = const_cast<char*>(cuda::scales_of(weight));
  args.first_row = first_row;
  args.rows = rows;
  args.cols = weight.cols;
  args.total_rows = weight.rows;
  args.format = weight.format;
  gpu.check(cuda::device_of(gpu).launchers().repack(&args, gpu.stream()), "repack a weight");
}

void draw_tokens(const TensorView& token, const TensorView& log_prob, const TensorView& logits,
                 const DrawInputs& inputs, const ExecContext& context) {
  QN_CHECK(logits.dtype == DType::F32 && logits.rank == 2, "[draw_tokens] logits is ",
           logits.describe(), ", expected f32[rows, vocab]");
  constexpr int64_t kMaxVocab = int64_t{1} << 18;
  QN_CHECK(logits.shape[1] <= kMaxVocab, "[draw_tokens] logits is ", logits.describe(),
           ", expected at most ", kMaxVocab, " columns");
  const qn::cuda::SampleArgs args{token.as<int32_t>(), log_prob.as<float>(), logits.as<float>(),
                                  inputs.temperature,  inputs.top_p,         inputs.min_p,
                                  inputs.top_k,        inputs.seed,          inputs.index,
                                  logits.shape[0],     logits.shape[1],      logits.stride[0]};
  context.gpu->check(cuda::launchers(context).sampling(&args, context.gpu->stream()),
                     "draw tokens");
}

void linear_w8a8(const TensorView& out, const TensorView& x, const TensorView& codes,
                 const TensorView& scales, const TensorView* bias, const ExecContext& context) {
  constexpr const char* kOp = "linear_w8a8";
  QN_CHECK(context.gpu != nullptr, "[linear_w8a8] x is on the CPU, expected a GPU");
  check_float(kOp, "out", out);
  check_dense_rows(kOp, "out", out);
  QN_CHECK(x.rank == 2 && codes.rank == 2 && x.shape[1] == codes.shape[1], "[linear_w8a8] x is ",
           x.describe(), " and codes ", codes.describe(),
           ", expected [tokens, cols] and [rows, cols]");
  const int64_t tokens = x.shape[0], rows = codes.shape[0], cols = x.shape[1];
  QN_CHECK(out.rank == 2 && out.shape[0] == tokens && out.shape[1] == rows, "[linear_w8a8] out is ",
           out.describe(), ", expected [", tokens, ", ", rows, "]");
  check_vector(kOp, "scales", scales, DType::F32, rows);
  QN_CHECK(is_aligned(scales.data), "[linear_w8a8] scales begins at no multiple of 16 bytes, ",
           "expected one on a GPU");
  if (bias != nullptr) check_vector(kOp, "bias", *bias, DType::BF16, rows);
  qn::cuda::QuantizeTokensArgs tokens_args{};
  tokens_args.x_stride = cuda::chunked_rows(kOp, "x", x, DType::BF16);
  qn::cuda::GemmArgs args{};
  args.weight_stride = cuda::chunked_rows(kOp, "codes", codes, DType::I8);
  if (tokens == 0 || rows == 0) return;
  const Workspace::Scope scope(context.workspace);
  tokens_args.codes = context.workspace.allocate_array<int8_t>(tokens * cols);
  tokens_args.scales = context.workspace.allocate_array<float>(tokens);
  tokens_args.x = x.data;
  tokens_args.tokens = tokens;
  tokens_args.cols = tokens_args.codes_stride = cols;
  const qn::cuda::Launchers& call = cuda::launchers(context);
  context.gpu->check(call.quantize_tokens(&tokens_args, context.gpu->stream()),
                     "run quantize_tokens");
  args.out = out.data;
  args.x = tokens_args.codes;
  args.weight = codes.data;
  args.scales = scales.data;
  args.bias = bias != nullptr ? bias->data : nullptr;
  args.tokens = tokens;
  args.rows = rows;
  args.cols = args.x_stride = cols;
  args.out_stride = out.stride[0];
  args.out_dtype = out.dtype;
  args.x_scales = tokens_args.scales;
  cuda::run_gemm(kOp, call.gemm_w8a8, args, context);
}

namespace cuda {

void rms_norm(const RmsNormArgs& args, int64_t rows, const ExecContext& context) {
  context.gpu->check(launchers(context).rms_norm(&args, rows, context.gpu->stream()),
                     "run rms_norm");
}

void swiglu(const SwigluArgs& args, int64_t tokens, const ExecContext& context) {
  context.gpu->check(launchers(context).swiglu(&args, tokens, context.gpu->stream()), "run swiglu");
}

int64_t chunked_rows(const char* op, const char* name, const TensorView& matrix, DType dtype) {
  QN_CHECK(matrix.dtype == dtype, "[", op, "] ", name, " is ", matrix.describe(), ", expected ",
           dtype_name(dtype), " on a GPU");
  check_dense_rows(op, name, matrix);
  const int64_t chunk = kChunkBytes / static_cast<int64_t>(dtype_size(dtype));
  const int64_t stride = matrix.shape[0] > 1 ? matrix.stride[0] : matrix.shape[1];
  QN_CHECK(matrix.shape[1] % chunk == 0 && stride % chunk == 0 && is_aligned(matrix.data), "[", op,
           "] ", name, " is ", matrix.describe(), " with rows ", stride, " elements apart, from ",
           is_aligned(matrix.data) ? "a" : "no", " multiple of 16 bytes on; expected multiples of ",
           chunk, " elements and 16 bytes on a GPU");
  return stride;
}

void run_gemm(const char* op, decltype(&::qn_cuda_gemm_bf16) gemm, qn::cuda::GemmArgs args,
              const ExecContext& context) {
  QN_CHECK(is_aligned(args.out), "[", op, "] out begins at no multiple of 16 bytes, expected one ",
           "on a GPU");
  QN_CHECK(is_aligned(args.bias), "[", op, "] bias begins at no multiple of 16 bytes, expected ",
           "one on a GPU");
  const Workspace::Scope scope(context.workspace);
  const qn::cuda::Device& device = cuda::device_of(*context.gpu);
  qn::cuda::GemmPlan plan;
  device.launchers().gemm_plan(&args, &device.device_info(), &plan);
  const int64_t bytes = device.launchers().gemm_workspace(&plan);
  if (bytes > 0)
    args.workspace = static_cast<float*>(context.workspace.allocate(static_cast<size_t>(bytes)));
  device.check(gemm(&args, &device.device_info(), device.stream()), "run a gemm");
}

void gather(const TensorView& out, const TensorView& ids, const WeightView& table,
            const ExecContext& context) {
  check_activation("gather", "out", out);
  check_format("gather", "table", table);
  QN_CHECK(!is_dense(table.format) || table.rows <= 1 || table.row_stride == table.cols,
           "[gather] table has rows ", table.row_stride, " elements apart, expected its ",
           table.cols, " columns on a GPU");
  QN_CHECK(ids.shape[0] <= 1 || ids.stride[0] == 1, "[gather] ids has stride ", ids.stride[0],
           ", expected 1 on a GPU");
  qn::cuda::EmbedArgs args{};
  args.out = out.data;
  args.ids = ids.as<int32_t>();
  args.table = table.data;
  args.scales = is_dense(table.format) ? nullptr : scales_of(table);
  args.tokens = ids.shape[0];
  args.rows = table.rows;
  args.cols = table.cols;
  args.out_stride = out.stride[0];
  args.group_size = static_cast<int32_t>(group_size(table));
  args.bits = bits_of(table.format);
  context.gpu->check(launchers(context).gather(&args, context.gpu->stream()), "run gather");
}

void linear(const TensorView& out, const TensorView& x, std::span<const LinearSegment> segments,
            Epilogue epilogue, bool invariant, const ExecContext& context) {
  const int64_t x_stride = chunked_rows("linear", "x", x, DType::BF16);
  const qn::cuda::Launchers& call = launchers(context);
  for (const LinearSegment& segment : segments) {
    const WeightView& weight = segment.weight;
    if (weight.rows == 0) continue;
    check_format("linear", "weight", weight);
    qn::cuda::GemmArgs args{};
    args.out = static_cast<char*>(out.data) +
               segment.out_offset * static_cast<int64_t>(dtype_size(out.dtype));
    args.x = x.data;
    args.weight = weight.data;
    if (is_dense(weight.format)) {
      TensorView matrix(const_cast<void*>(weight.data), DType::BF16, {weight.rows, weight.cols});
      matrix.stride[0] = weight.row_stride;
      args.weight_stride = chunked_rows("linear", "weight", matrix, DType::BF16);
    } else {
      args.scales = scales_of(weight);
    }
    args.bias = segment.bias;
    args.tokens = x.shape[0];
    args.rows = weight.rows;
    args.cols = weight.cols;
    args.out_stride = out.stride[0];
    args.x_stride = x_stride;
    args.group_size = static_cast<int32_t>(group_size(weight));
    args.out_dtype = out.dtype;
    args.invariant = invariant;
    args.add = epilogue == Epilogue::Add;
    const int bits = bits_of(weight.format);
    run_gemm("linear",
             bits == 16  ? call.gemm_bf16
             : bits == 8 ? call.gemm_int8
                         : call.gemm_int4,
             args, context);
  }
}

void append_qkv(const TensorView& qkv, const QkvTransform& transform, const KvLayer& layer,
                const Batch& batch, const ExecContext& context) {
  check_activation("append_qkv", "qkv", qkv);
  QN_CHECK(2 * batch.cos.shape[1] == layer.head_dim, "[append_qkv] cos is ", batch.cos.describe(),
           ", expected ", layer.head_dim / 2, " columns on a GPU");
  qn::cuda::RopeKvArgs args{};
  args.q = qkv.data;
  args.qkv = qkv.data;
  args.bias = transform.bias.data;
  args.q_norm = transform.q_norm.data;
  args.k_norm = transform.k_norm.data;
  args.cos = batch.cos.as<float>();
  args.sin = batch.sin.as<float>();
  args.positions = batch.gpu.positions;
  args.query_scale = batch.query_scale.as<float>();
  args.key_scale = layer.key_scale;
  args.slots = batch.gpu.slots;
  args.tokens = batch.tokens();
  args.q_stride = args.qkv_stride = qkv.stride[0];
  args.num_heads = static_cast<int32_t>(qkv.shape[1] / layer.head_dim - 2 * layer.num_kv_heads);
  args.eps = transform.eps;
  args.kv = pages_of(layer);
  context.gpu->check(launchers(context).rope(&args, context.gpu->stream()), "run rope");
}

void attention(const TensorView& out, const TensorView& q, const KvLayer& layer, const Batch& batch,
               float scale, int64_t window, const ExecContext& context) {
  check_activation("attention", "q", q);
  check_activation("attention", "out", out);
  const Workspace::Scope scope(context.workspace);
  const Gpu& gpu = *context.gpu;
  const Batch::OnGpu& on_gpu = batch.gpu;
  qn::cuda::PagedAttentionArgs args{};
  args.out = out.data;
  args.q = q.data;
  args.page_table = on_gpu.page_table;
  args.query_begin = on_gpu.query_begin;
  args.kv_len = on_gpu.kv_len;
  args.q_stride = q.stride[0];
  args.out_stride = out.stride[0];
  args.page_table_stride = static_cast<int32_t>(on_gpu.page_table_stride);
  args.max_query_len = static_cast<int32_t>(on_gpu.max_query_len);
  args.max_kv_len = static_cast<int32_t>(on_gpu.max_kv_len);
  args.num_heads = static_cast<int32_t>(q.shape[1]);
  args.window = static_cast<int32_t>(window);
  args.scale = scale;
  args.kv = pages_of(layer);

  qn::cuda::PagedAttentionArgs decode = args;
  decode.sequences = static_cast<int32_t>(on_gpu.decoding);
  const int64_t bytes = launchers(context).attention_decode_workspace(&decode);
  if (bytes > 0)
    decode.workspace = static_cast<float*>(context.workspace.allocate(static_cast<size_t>(bytes)));
  gpu.check(launchers(context).attention_decode(&decode, gpu.stream()), "run attention");

  args.sequences = static_cast<int32_t>(on_gpu.sequences - on_gpu.decoding);
  args.page_table += on_gpu.decoding * on_gpu.page_table_stride;
  args.query_begin += on_gpu.decoding;
  args.kv_len += on_gpu.decoding;
  gpu.check(launchers(context).attention_prefill(&args, gpu.stream()), "run attention");
}

}  // namespace cuda
}  // namespace qn::ops
