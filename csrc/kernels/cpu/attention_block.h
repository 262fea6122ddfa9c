// What all paths of attention share: an item's scratch memory, the blocks of keys that it needs,
// the running maxima and sums of its rows, and how parts become a result.
#pragma once
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int kGroup = 32;   // keys; a group never crosses a page
constexpr int kBlock = 128;  // keys
constexpr int kGroups = kBlock / kGroup;
constexpr int kScoreStride = kBlock + 16;  // 512 B apart, rows would compete for cache sets
constexpr float kMinusInfinity = -__builtin_inff();
static_assert(kAttentionPart % kBlock == 0);

/// Unnormalised result of a part, or of all parts so far.
struct Partial {
  float* out;  // [rows, head_dim]
  float* max;  // [rows], m
  float* sum;  // [rows]
};

/// A part's online softmax.
struct Softmax {
  float sums[kAttentionRows * Vec::kLanes];  // l, spread over the lanes
  float max[kAttentionRows];                 // m
  float offset[kAttentionRows];              // m as TilePath::probs_of wants it
  float rescale[kAttentionRows];  // what the latest block asks the rows of out to be multiplied by
  bool any_rescale;
};

/// Some arrays are a few lines longer than needed, so that they do not all start at the same offset
/// in a page: loads wait for earlier stores to the same offset.
struct alignas(64) Scratch {
  bf16 keys[kBlock * kAttentionMaxHeadDim];  // of int8 pages, a block or on tiles two groups
  bf16 values[kBlock * kAttentionMaxHeadDim];
  float scores[2][kAttentionRows * kScoreStride + 5 * 16];
  bf16 probs[2][kAttentionRows * kBlock + 7 * 32];
  float query[kAttentionRows * kAttentionMaxHeadDim + 11 * 16];
  float part_out[2][kAttentionRows * kAttentionMaxHeadDim + 3 * 16];
  float total_out[kAttentionRows * kAttentionMaxHeadDim];
  Softmax softmax[2];
  float total_max[kAttentionRows], total_sum[kAttentionRows];
  float scale[kAttentionRows][Vec::kLanes];  // where q is not scaled itself
  float part_sum[kAttentionRows];
  alignas(64) float value_scales[kBlock];  // of a block of int8 pages
  float inverse_scales[kBlock];
  int64_t keys_begin[kAttentionRows], keys_end[kAttentionRows];  // positions that a row sees
};
static_assert(sizeof(Scratch) <= kAttentionScratchBytes, "ops reserve too little");

/// The groups of a block that an item's rows need.
struct Block {
  int64_t first_key;  // of the first group
  int groups;
  bool visible_to_all;
  bool starts_part, ends_part;
  const char* keys[kGroups];
  const char* values[kGroups];
  const float* key_scales[kGroups];  // int8 pages only
  const float* value_scales[kGroups];
};

/// The blocks [begin, end) that an item needs, numbered from the start of the sequence.
struct BlockRange {
  int64_t begin, end;
};

int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

BlockRange blocks_of(const AttentionItem& item, const Scratch& s) {
  constexpr int64_t kPerPart = kAttentionPart / kBlock;
  return {greatest(item.part_begin * kPerPart, s.keys_begin[0] / kBlock),
          least(item.part_end * kPerPart, (s.keys_end[item.rows - 1] + kBlock - 1) / kBlock)};
}

/// Dims of a key as it lies in pages, with those that fill up a tile.
int64_t key_dims(const KvGeometry& kv) {
  return kv.value_offset / (kv.page_tokens * static_cast<int64_t>(dtype_size(kv.dtype)));
}

Block locate(const AttentionArgs& a, const AttentionItem& item, const Scratch& s,
             const BlockRange& range, int64_t index) {
  constexpr int64_t kPerPart = kAttentionPart / kBlock;
  const int64_t begin = greatest(index * kGroups, s.keys_begin[0] / kGroup);
  const int64_t end =
      least((index + 1) * kGroups, (s.keys_end[item.rows - 1] + kGroup - 1) / kGroup);
  Block block;
  block.first_key = begin * kGroup;
  block.groups = static_cast<int>(end - begin);
  block.starts_part = index == range.begin || index % kPerPart == 0;
  block.ends_part = index + 1 == range.end || (index + 1) % kPerPart == 0;
  block.visible_to_all = block.first_key >= s.keys_begin[item.rows - 1] &&
                         block.first_key + block.groups * kGroup <= s.keys_end[0];
  const int64_t size = static_cast<int64_t>(dtype_size(a.kv.dtype));
  const int64_t key_bytes = a.kv.dtype == DType::F32 ? 4 : key_dims(a.kv) * size;
  for (int g = 0; g < block.groups; ++g) {
    const int64_t key = block.first_key + g * kGroup;
    const int64_t slot = key % a.kv.page_tokens;
    const char* head = a.base + item.page_table[key / a.kv.page_tokens] * a.page_stride +
                       item.kv_head * a.kv.head_bytes;
    block.keys[g] = head + slot * key_bytes;
    block.values[g] = head + a.kv.value_offset + slot * a.kv.head_dim * size;
    if (a.kv.dtype == DType::I8) {
      block.key_scales[g] = reinterpret_cast<const float*>(head + a.kv.scale_offset) + slot;
      block.value_scales[g] = block.key_scales[g] + a.kv.page_tokens;
    }
  }
  return block;
}

/// A row's scores or probabilities times the scales of their keys or values.
QN_INLINE void scale_by_key(const Block& block, const float* const (&scales)[kGroups],
                            float* scores) {
  for (int g = 0; g < block.groups; ++g, scores += kGroup) {
    for (int key = 0; key < kGroup; key += Vec::kLanes) {
      (Vec::load(scores + key) * Vec::load(scales[g] + key)).store(scores + key);
    }
  }
}

/// The codes of int8 pages as bf16, which hold them exactly, in the same order.
void widen_codes(int64_t codes, int groups, const char** block, bf16* wide) {
  for (int g = 0; g < groups; ++g, wide += codes) {
    const int8_t* const group = reinterpret_cast<const int8_t*>(block[g]);
    for (int64_t i = 0; i < codes; i += 2 * Vec::kLanes) {
      Vec even, odd;
      load_pairs(group + i, even, odd);
      store_exact_pairs(wide + i, even, odd);
    }
    block[g] = reinterpret_cast<const char*>(wide);
  }
}

/// Keys from one dim, or pair of dims, to the next in what the paths multiply.
int64_t key_stride(const KvGeometry& kv) {
  return kv.dtype == DType::F32 ? kv.page_tokens : kGroup;
}

/// Scores outside [keys_begin, keys_end) become -inf.
void mask_row(const Block& block, int64_t keys_begin, int64_t keys_end, float* scores) {
  const int64_t count = block.groups * kGroup;
  const int64_t first = keys_begin - block.first_key, last = keys_end - block.first_key;
  for (int64_t key = 0; key < first && key < count; ++key) scores[key] = kMinusInfinity;
  for (int64_t key = greatest(last, 0); key < count; ++key) scores[key] = kMinusInfinity;
}

/// Raises m of a row to `top`, and scales what was summed under the old one.
__attribute__((noinline)) void raise_max(Softmax& softmax, int row, float top) {
  const float old = softmax.max[row];
  softmax.max[row] = top;
  if (old == kMinusInfinity) return;  // nothing but zeros was summed
  const Vec factor = exp2(Vec(old - top));
  float lanes[Vec::kLanes];
  factor.store(lanes);
  softmax.rescale[row] = lanes[0];
  softmax.any_rescale = true;
  float* sums = softmax.sums + row * Vec::kLanes;
  (Vec::load(sums) * factor).store(sums);
}

void start_part(Softmax& softmax, int rows) {
  memset(softmax.sums, 0, static_cast<size_t>(rows) * Vec::kLanes * sizeof(float));
  for (int r = 0; r < rows; ++r) softmax.max[r] = kMinusInfinity;
}

void start_block(Softmax& softmax, int rows) {
  for (int r = 0; r < rows; ++r) softmax.rescale[r] = 1.0f;
  softmax.any_rescale = false;
}

void rescale_rows(const Softmax& softmax, int rows, int64_t head_dim, float* out) {
  if (!softmax.any_rescale) return;
  for (int r = 0; r < rows; ++r, out += head_dim) {
    if (softmax.rescale[r] == 1.0f) continue;
    const Vec factor(softmax.rescale[r]);
    for (int64_t dim = 0; dim < head_dim; dim += Vec::kLanes) {
      (Vec::load(out + dim) * factor).store(out + dim);
    }
  }
}

/// total = total merged with part. A row that sees nothing on one side keeps the other unchanged.
__attribute__((noinline)) void merge(const Partial& total, const Partial& part, int64_t rows,
                                     int64_t head_dim) {
  for (int64_t r = 0; r < rows; ++r) {
    if (part.sum[r] == 0) continue;
    float* out = total.out + r * head_dim;
    const float* more = part.out + r * head_dim;
    if (total.sum[r] == 0) {
      memcpy(out, more, static_cast<size_t>(head_dim) * sizeof(float));
      total.max[r] = part.max[r];
      total.sum[r] = part.sum[r];
      continue;
    }
    const float old = total.max[r], added = part.max[r];
    const float top = old > added ? old : added;
    const Vec old_factor = exp2(Vec(old - top)), new_factor = exp2(Vec(added - top));
    for (int64_t dim = 0; dim < head_dim; dim += Vec::kLanes) {
      fma(Vec::load(out + dim), old_factor, Vec::load(more + dim) * new_factor).store(out + dim);
    }
    float sum[Vec::kLanes];
    fma(Vec(total.sum[r]), old_factor, Vec(part.sum[r]) * new_factor).store(sum);
    total.sum[r] = sum[0];
    total.max[r] = top;
  }
}

void write_out(const AttentionArgs& a, const AttentionItem& item, const Partial& total) {
  for (int64_t r = 0; r < item.rows; ++r) {
    const int64_t row = item.first_row + r;
    float* out = a.out + (item.token + row / a.group) * a.out_stride +
                 (item.kv_head * a.group + row % a.group) * a.out_head_stride;
    const Vec inverse = Vec(1.0f) / Vec(total.sum[r]);
    for (int64_t dim = 0; dim < a.kv.head_dim; dim += Vec::kLanes) {
      (Vec::load(total.out + r * a.kv.head_dim + dim) * inverse).store(out + dim);
    }
  }
}

/// Where the parts of an item leave their results.
struct PartResults {
  const AttentionArgs& args;
  const AttentionItem& item;
  Scratch& s;

  /// Unnormalised outputs of the part that the block belongs to.
  float* out(const Block& block) const {
    const int64_t part = block.first_key / kAttentionPart;
    return item.partial != nullptr
               ? item.partial + (part - item.part_begin) * item.partial_stride + 2 * kAttentionRows
               : s.part_out[part % 2];
  }

  /// Takes the sums of the part that ends with the block, whose out is complete.
  void finish(const Block& block, const Softmax& softmax) const {
    const int64_t head_dim = args.kv.head_dim;
    float* const result = out(block);
    float* const sums = item.partial != nullptr ? result - kAttentionRows : s.part_sum;
    for (int r = 0; r < item.rows; ++r) sums[r] = sum(Vec::load(softmax.sums + r * Vec::kLanes));
    if (item.partial != nullptr) {
      memcpy(result - 2 * kAttentionRows, softmax.max, sizeof(softmax.max));
    } else {
      float* const max = const_cast<float*>(softmax.max);
      merge({s.total_out, s.total_max, s.total_sum}, {result, max, sums}, item.rows, head_dim);
    }
  }
};

}  // namespace
}  // namespace qn::cpu::QN_ISA
