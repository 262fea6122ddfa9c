#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/cuda.h"
#include "ops/ops.h"

namespace qn::ops {
namespace {

constexpr int64_t kKeysPerGroup = 32;
constexpr int64_t kTileDepth = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

KvGeometry geometry(const char* op, int64_t page_tokens, int64_t num_kv_heads, int64_t head_dim,
                    DType dtype) {
  QN_CHECK(page_tokens > 0 && page_tokens % kKeysPerGroup == 0, "[", op, "] page_tokens is ",
           page_tokens, ", expected a positive multiple of ", kKeysPerGroup);
  QN_CHECK(num_kv_heads > 0, "[", op, "] num_kv_heads is ", num_kv_heads, ", expected at least 1");
  QN_CHECK(head_dim > 0 && head_dim % 16 == 0 && head_dim <= kAttentionMaxHeadDim, "[", op,
           "] head_dim is ", head_dim, ", expected a multiple of 16 up to ", kAttentionMaxHeadDim);
  QN_CHECK(dtype == DType::F32 || dtype == DType::BF16 || dtype == DType::I8, "[", op,
           "] dtype of the cache is ", dtype_name(dtype), ", expected f32, bf16 or int8");
  const int64_t size = static_cast<int64_t>(dtype_size(dtype));
  const int64_t key_dims =
      dtype == DType::F32 ? head_dim : ceil_div(head_dim, kTileDepth) * kTileDepth;
  KvGeometry kv{};
  kv.page_tokens = page_tokens;
  kv.num_kv_heads = num_kv_heads;
  kv.head_dim = head_dim;
  kv.value_offset = page_tokens * key_dims * size;
  kv.scale_offset = kv.value_offset + page_tokens * head_dim * size;
  kv.head_bytes = kv.scale_offset;
  if (dtype == DType::I8) kv.head_bytes += 2 * page_tokens * static_cast<int64_t>(sizeof(float));
  kv.dtype = dtype;
  return kv;
}

KvGeometry geometry(const char* op, const KvLayer& layer) {
  const KvGeometry kv =
      geometry(op, layer.page_tokens, layer.num_kv_heads, layer.head_dim, layer.dtype);
  const int64_t page_bytes = kv.head_bytes * kv.num_kv_heads;
  QN_CHECK(layer.page_stride >= page_bytes, "[", op, "] page_stride is ", layer.page_stride,
           " bytes, expected at least ", page_bytes);
  QN_CHECK(layer.key_scale == nullptr || layer.dtype == DType::I8, "[", op,
           "] key_scale is given for a cache of ", dtype_name(layer.dtype), ", expected int8");
  return kv;
}

void check_rows(const char* op, const char* name, const TensorView& tensor, int64_t head_dim) {
  QN_CHECK(tensor.dtype == DType::F32 && tensor.rank == 3 && tensor.shape[2] == head_dim, "[", op,
           "] ", name, " is ", tensor.describe(), ", expected f32[tokens, heads, ", head_dim, "]");
  check_dense_rows(op, name, tensor);
}

void check_spans(const char* op, std::span<const SequenceSpan> spans, int64_t tokens) {
  for (size_t i = 0; i < spans.size(); ++i) {
    const SequenceSpan& span = spans[i];
    QN_CHECK(span.query_begin >= 0 && span.query_count >= 0 && span.query_begin <= tokens &&
                 span.query_count <= tokens - span.query_begin,
             "[", op, "] span ", i, " has rows ", span.query_begin, " to ",
             span.query_begin + span.query_count, ", expected rows within 0 to ", tokens);
    QN_CHECK(span.kv_len >= span.query_count, "[", op, "] span ", i, " has kv_len ", span.kv_len,
             ", expected at least its ", span.query_count, " rows");
    QN_CHECK(span.query_count == 0 || span.page_table != nullptr, "[", op, "] span ", i,
             " has no page table, expected one");
  }
}

/// Keys [begin, end) that the item's rows see, all together.
struct KeyRange {
  int64_t begin, end;
};

KeyRange keys_of(const AttentionItem& item, int64_t group, int64_t window) {
  const int64_t first = item.position + item.first_row / group;
  const int64_t last = item.position + (item.first_row + item.rows - 1) / group;
  return {window > 0 ? std::max<int64_t>(0, first + 1 - window) : 0, last + 1};
}

}  // namespace

size_t kv_page_bytes(int64_t page_tokens, int64_t num_kv_heads, int64_t head_dim, DType dtype) {
  const KvGeometry kv = geometry("kv_page_bytes", page_tokens, num_kv_heads, head_dim, dtype);
  return static_cast<size_t>(kv.head_bytes * kv.num_kv_heads);
}

void kv_append(const KvLayer& layer, const TensorView& k, const TensorView& v,
               std::span<const SequenceSpan> spans, const ExecContext& context) {
  constexpr const char* kOp = "kv_append";
  KvAppendArgs args{};
  args.kv = geometry(kOp, layer);
  check_rows(kOp, "k", k, layer.head_dim);
  QN_CHECK(k.shape[1] == layer.num_kv_heads, "[kv_append] k is ", k.describe(), ", expected ",
           layer.num_kv_heads, " heads");
  check_same_shape(kOp, "v", v, "k", k);
  check_dense_rows(kOp, "v", v);
  check_spans(kOp, spans, k.shape[0]);
  const Workspace::Scope scope(context.workspace);
  int64_t capacity = 0;
  for (const SequenceSpan& span : spans) capacity += span.query_count / layer.page_tokens + 2;
  auto* items = context.workspace.allocate_array<KvAppendItem>(capacity);
  int64_t count = 0;
  for (const SequenceSpan& span : spans) {
    for (int64_t done = 0; done < span.query_count;) {
      const int64_t position = span.kv_len - span.query_count + done;
      KvAppendItem& item = items[count++];
      item.page = static_cast<char*>(layer.base) +
                  span.page_table[position / layer.page_tokens] * layer.page_stride;
      item.token = span.query_begin + done;
      item.slot = position % layer.page_tokens;
      item.count = std::min(span.query_count - done, layer.page_tokens - item.slot);
      done += item.count;
    }
  }
  args.k = k.as<const float>();
  args.v = v.as<const float>();
  args.k_stride = k.stride[0];
  args.k_head_stride = k.stride[1];
  args.v_stride = v.stride[0];
  args.v_head_stride = v.stride[1];
  args.items = items;
  args.key_scale = layer.key_scale;
  const auto kernel = cpu::active_cpu_kernels().kv_append;
  // A single token is not worth waking threads for.
  const int64_t grain =
      std::max<int64_t>(1, layer.num_kv_heads * count / std::max<int64_t>(1, k.shape[0]));
  context.pool.parallel_for(count * layer.num_kv_heads, grain,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
}

void attention(const TensorView& out, const TensorView& q, const KvLayer& layer,
               std::span<const SequenceSpan> spans, const AttentionOptions& options,
               const ExecContext& context) {
  constexpr const char* kOp = "attention";
  AttentionArgs args{};
  args.kv = geometry(kOp, layer);
  check_rows(kOp, "q", q, layer.head_dim);
  check_same_shape(kOp, "out", out, "q", q);
  check_dense_rows(kOp, "out", out);
  QN_CHECK(q.shape[1] > 0 && q.shape[1] % layer.num_kv_heads == 0, "[attention] q has ", q.shape[1],
           " heads, expected a multiple of the ", layer.num_kv_heads, " kv heads");
  check_spans(kOp, spans, q.shape[0]);
  QN_CHECK(std::isfinite(options.scale) && options.scale > 0, "[attention] scale is ",
           options.scale, ", expected a positive number");
  QN_CHECK(options.window >= 0, "[attention] window is ", options.window, ", expected at least 0");
  for (int64_t i = 0; options.query_scale != nullptr && i < q.shape[0]; ++i) {
    const float factor = options.query_scale[i];
    QN_CHECK(std::isfinite(factor) && factor > 0, "[attention] query_scale[", i, "] is ", factor,
             ", expected a positive number");
  }
  args.out = out.as<float>();
  args.q = q.as<const float>();
  args.out_stride = out.stride[0];
  args.out_head_stride = out.stride[1];
  args.q_stride = q.stride[0];
  args.q_head_stride = q.stride[1];
  args.group = q.shape[1] / layer.num_kv_heads;
  args.base = static_cast<const char*>(layer.base);
  args.page_stride = layer.page_stride;
  args.scale = options.scale;
  args.window = options.window;
  args.query_scale = options.query_scale;
  args.key_scale = layer.key_scale;

  // Tiles: up to kAttentionRows rows with all their parts, the longest first.
  const Workspace::Scope scope(context.workspace);
  Workspace& workspace = context.workspace;
  int64_t tile_count = 0;
  for (const SequenceSpan& span : spans) {
    tile_count += ceil_div(span.query_count * args.group, kAttentionRows) * layer.num_kv_heads;
  }
  auto* tiles = workspace.allocate_array<AttentionItem>(tile_count);
  int64_t tile = 0, total_parts = 0;
  for (const SequenceSpan& span : spans) {
    const int64_t rows = span.query_count * args.group;
    for (int64_t kv_head = 0; kv_head < layer.num_kv_heads; ++kv_head) {
      for (int64_t row_tile = ceil_div(rows, kAttentionRows); row_tile-- > 0;) {
        AttentionItem& item = tiles[tile++];
        item = AttentionItem{};
        item.page_table = span.page_table;
        item.token = span.query_begin;
        item.position = span.kv_len - span.query_count;
        item.first_row = row_tile * kAttentionRows;
        item.rows = static_cast<int32_t>(std::min<int64_t>(kAttentionRows, rows - item.first_row));
        item.kv_head = static_cast<int32_t>(kv_head);
        const KeyRange keys = keys_of(item, args.group, args.window);
        item.part_begin = static_cast<int32_t>(keys.begin / kAttentionPart);
        item.part_end = static_cast<int32_t>(ceil_div(keys.end, kAttentionPart));
        total_parts += item.part_end - item.part_begin;
      }
    }
  }

  // Few long tiles (decode) are split by parts, so that every thread has work; whoever finishes the
  // last part of a tile merges them. The split does not change the arithmetic.
  const int64_t threads = context.pool.threads();
  constexpr int64_t kItemsPerThread = 8;
  const int64_t parts_per_item =
      threads == 1 ? total_parts + 1
                   : std::max<int64_t>(1, total_parts / (threads * kItemsPerThread));
  const auto splits = [&](const AttentionItem& item) {
    const int64_t parts = item.part_end - item.part_begin;
    return parts >= 2 * parts_per_item ? ceil_div(parts, parts_per_item) : 1;
  };
  int64_t item_count = 0;
  for (tile = 0; tile < tile_count; ++tile) item_count += splits(tiles[tile]);
  auto* items = workspace.allocate_array<AttentionItem>(item_count);
  auto* tile_of = workspace.allocate_array<int64_t>(item_count);
  auto* unfinished = workspace.allocate_array<std::atomic<int64_t>>(tile_count);
  int64_t count = 0;
  for (tile = 0; tile < tile_count; ++tile) {
    AttentionItem& whole = tiles[tile];
    const int64_t pieces = splits(whole);
    new (&unfinished[tile]) std::atomic<int64_t>(pieces);
    if (pieces > 1) {
      const int64_t rows = whole.rows > 16 ? kAttentionRows : whole.rows;
      whole.partial_stride = 2 * kAttentionRows + rows * layer.head_dim;
      whole.partial = workspace.allocate_array<float>(whole.partial_stride *
                                                      (whole.part_end - whole.part_begin));
    }
    for (int64_t piece = 0; piece < pieces; ++piece) {
      AttentionItem& item = items[count];
      tile_of[count++] = tile;
      item = whole;
      if (pieces == 1) break;
      item.part_begin = static_cast<int32_t>(whole.part_begin + piece * parts_per_item);
      item.part_end =
          static_cast<int32_t>(std::min<int64_t>(whole.part_end, item.part_begin + parts_per_item));
      item.partial += (item.part_begin - whole.part_begin) * whole.partial_stride;
    }
  }
  args.items = items;
  AttentionArgs merge_args = args;
  merge_args.items = tiles;
  auto* scratch =
      static_cast<char*>(workspace.allocate(static_cast<size_t>(threads * kAttentionScratchBytes)));
  const cpu::CpuKernels& kernels = cpu::active_cpu_kernels();
  context.pool.parallel_for(item_count, 1, [&](int64_t begin, int64_t end, int thread) {
    kernels.attention(args, begin, end, scratch + thread * kAttentionScratchBytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t owner = tile_of[i];
      if (tiles[owner].partial != nullptr &&
          unfinished[owner].fetch_sub(1, std::memory_order_acq_rel) == 1) {
        kernels.attention_merge(merge_args, owner, owner + 1);
      }
    }
  });
}

void attention(const TensorView& out, const TensorView& q, const KvLayer& layer, const Batch& batch,
               float scale, int64_t window, const ExecContext& context) {
  if (context.gpu != nullptr) return cuda::attention(out, q, layer, batch, scale, window, context);
  attention(out, q, layer, batch.spans, {scale, window, batch.query_scale.as<const float>()},
            context);
}

}  // namespace qn::ops
