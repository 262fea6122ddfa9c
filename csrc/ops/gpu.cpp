#include "ops/gpu.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "kernels/cuda/library.h"
#include "ops/check.h"
#include "ops/cuda.h"

namespace qn::ops {
namespace {

int64_t table_stride(int64_t max_kv_len, int64_t page_tokens) {
  return (max_kv_len + page_tokens - 1) / page_tokens;
}

}  // namespace

std::shared_ptr<const Gpu> open_gpu(const std::string& library) {
  return std::make_shared<const qn::cuda::Device>(library);
}

bool gpu_has_format(WeightFormat format) {
  return cuda::is_dense(format) || format == WeightFormat::Int8 ||
         format == WeightFormat::Int8Grouped || format == WeightFormat::Int4Symmetric;
}

size_t gpu_weight_bytes(WeightFormat format, int64_t rows, int64_t cols) {
  QN_CHECK(gpu_has_format(format), "[gpu] weights are ", weight_format_name(format),
           ", expected bf16, int8, int8_grouped or int4_symmetric on a GPU");
  if (cuda::is_dense(format)) return static_cast<size_t>(rows * cols) * sizeof(bf16);
  const int64_t groups = format == WeightFormat::Int8 ? 1 : group_count(cols);
  return static_cast<size_t>(cuda::code_bytes(format, rows, cols) +
                             groups * qn::cuda::packed_tiles(rows) * qn::cuda::kPackedTile * 2);
}

size_t gpu_kv_page_bytes(int64_t page_tokens, int64_t num_kv_heads, int64_t head_dim, DType dtype) {
  QN_CHECK(page_tokens >= 16 && page_tokens <= 1024 &&
               std::has_single_bit(static_cast<uint64_t>(page_tokens)),
           "[kv_page_bytes] page_tokens is ", page_tokens,
           ", expected a power of two from 16 to 1024 on a GPU");
  QN_CHECK(dtype == DType::BF16 || dtype == DType::I8, "[kv_page_bytes] dtype of the cache is ",
           dtype_name(dtype), ", expected bf16 or int8 on a GPU");
  const bool wide = dtype == DType::BF16;
  QN_CHECK(head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128,
           "[kv_page_bytes] head_dim is ", head_dim, ", expected 64, 80, 96 or 128 on a GPU");
  const int64_t row_bytes = 2 * head_dim * (wide ? 2 : 1) + (wide ? 0 : 2 * sizeof(float));
  return static_cast<size_t>(row_bytes * page_tokens * num_kv_heads);
}

size_t batch_bytes(const Batch& batch, int64_t sequences, int64_t max_kv_len, int64_t page_tokens) {
  const auto bytes = [](int64_t count) {
    return GpuInputs::padded(static_cast<size_t>(count) * sizeof(int32_t));
  };
  const int64_t added = sequences - static_cast<int64_t>(batch.spans.size());
  const int64_t tokens = batch.tokens() + added, rows = batch.output_rows.shape[0] + added;
  return 4 * bytes(tokens) + bytes(rows) + 2 * bytes(tokens * batch.cos.shape[1]) +
         bytes(sequences * table_stride(max_kv_len, page_tokens)) + 2 * bytes(sequences + 1);
}

Batch upload_batch(const Batch& host, int64_t sequences, int64_t max_kv_len, int64_t page_tokens,
                   GpuInputs& inputs) {
  const int64_t added = sequences - static_cast<int64_t>(host.spans.size());
  const int64_t tokens = host.tokens() + added;
  const int64_t stride = table_stride(max_kv_len, page_tokens);
  const size_t half = static_cast<size_t>(host.cos.shape[1]);
  Batch batch;
  batch.spans = host.spans;
  batch.gpu.sequences = sequences;
  batch.gpu.max_kv_len = max_kv_len;
  batch.gpu.page_table_stride = stride;

  // Copies of row 0 stand in for the added ones.
  const auto extended = [&](const auto* values, int64_t count, size_t width) {
    std::vector<std::decay_t<decltype(*values)>> result(
        values, values + static_cast<size_t>(count) * width);
    for (int64_t i = 0; i < added; ++i) result.insert(result.end(), values, values + width);
    return result;
  };
  const auto put = [&](const auto& values) { return inputs.put(values.data(), values.size()); };
  const auto floats = [&](const TensorView& view, size_t width) {
    return TensorView(put(extended(view.as<float>(), host.tokens(), width)), DType::F32,
                      {tokens, static_cast<int64_t>(width)});
  };
  batch.token_ids = TensorView(put(extended(host.token_ids.as<int32_t>(), host.tokens(), 1)),
                               DType::I32, {tokens});
  batch.cos = floats(host.cos, half);
  batch.sin = floats(host.sin, half);
  if (host.query_scale.data != nullptr) batch.query_scale = floats(host.query_scale, 1);

  std::vector<int32_t> positions(static_cast<size_t>(tokens)), slots, begins, lengths, pages;
  for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int32_t>(i);
  bool decoding = true;
  for (const SequenceSpan& span : host.spans) {
    decoding = decoding && span.query_count == 1;
    batch.gpu.decoding += decoding;
    batch.gpu.max_query_len = std::max(batch.gpu.max_query_len, span.query_count);
    begins.push_back(static_cast<int32_t>(span.query_begin));
    lengths.push_back(static_cast<int32_t>(span.kv_len));
    for (int64_t position = span.kv_len - span.query_count; position < span.kv_len; ++position) {
      slots.push_back(static_cast<int32_t>(span.page_table[position / page_tokens] * page_tokens +
                                           position % page_tokens));
    }
    const int64_t used = table_stride(span.kv_len, page_tokens);
    pages.insert(pages.end(), span.page_table, span.page_table + used);
    pages.resize(lengths.size() * static_cast<size_t>(stride), 0);
  }
  std::vector<int32_t> rows(host.output_rows.as<int32_t>(),
                            host.output_rows.as<int32_t>() + host.output_rows.shape[0]);
  for (int64_t i = 0; i < added; ++i) {
    rows.push_back(static_cast<int32_t>(host.tokens() + i));
    begins.push_back(static_cast<int32_t>(host.tokens() + i));
    lengths.push_back(lengths[0]);
    slots.push_back(-1);
    pages.insert(pages.end(), pages.begin(), pages.begin() + stride);
    ++batch.gpu.decoding;
  }
  begins.push_back(static_cast<int32_t>(tokens));
  batch.output_rows = TensorView(put(rows), DType::I32, {static_cast<int64_t>(rows.size())});
  batch.gpu.positions = put(positions);
  batch.gpu.slots = put(slots);
  batch.gpu.query_begin = put(begins);
  batch.gpu.kv_len = put(lengths);
  batch.gpu.page_table = put(pages);
  return batch;
}

size_t draw_bytes(int64_t rows) {
  const size_t count = static_cast<size_t>(rows);
  return 4 * GpuInputs::padded(count * 4) + 2 * GpuInputs::padded(count * 8);
}

DrawInputs upload_draws(std::span<const DrawOptions> rows, GpuInputs& inputs) {
  const auto put = [&](auto DrawOptions::* member) {
    std::vector<std::decay_t<decltype(rows[0].*member)>> values;
    for (const DrawOptions& row : rows) values.push_back(row.*member);
    return inputs.put(values.data(), values.size());
  };
  DrawInputs result{};
  result.temperature = put(&DrawOptions::temperature);
  result.top_p = put(&DrawOptions::top_p);
  result.min_p = put(&DrawOptions::min_p);
  result.top_k = put(&DrawOptions::top_k);
  result.seed = put(&DrawOptions::seed);
  result.index = put(&DrawOptions::index);
  return result;
}

}  // namespace qn::ops
