// Causal attention over the paged KV cache, for prefill and decode: out = softmax(scale q k^T) v.
//
//   q, out [tokens, num_heads, head_dim] f32; pages f32 or bf16 (layouts: KvGeometry in args.h)
//   item: up to 32 query rows (tokens x heads) that share a kv head, against a range of parts
//
// Scores are scaled by scale log2(e) and thus exponents of two. A row takes its keys in blocks of
// 128, cut at absolute positions, with an online softmax: o = o 2^(m - m') + p v,
// l = l 2^(m - m') + sum(p), p = 2^(s - m'), where m' >= m follows the largest score. Every
// kAttentionPart keys m, l and o start afresh, and the parts are merged in ascending order. Decode
// computes parts in parallel and merges them afterwards, prefill merges as it goes: the arithmetic
// is the same, and no row's depends on its neighbours. Keys that a row may not see get the score
// -inf and thus add an exact zero, so it does not matter which keys an item covers beyond those
// that its rows see.
//
//   accumulation: float32 throughout; level amx with bf16 pages rounds q and p to bf16 and
//   multiplies with tiles (2 x 1 accumulators), p from fixed point, a single row as tiles would do
//   it; everything else multiplies with fma on widened pages; the codes of int8 pages become bf16
//   or float32, which hold them exactly, and their scales multiply scores and probabilities
//   bytes per item and key: 2 * head_dim * sizeof(T), read from the cache once for all rows
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"
#if QN_ISA_LEVEL >= 3
#include "kernels/cpu/amx_tile.h"
#endif

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

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
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

/// Turns a row's scores of one block into probabilities, in place.
template <int G>
QN_INLINE void softmax_row(Softmax& softmax, float* scores, int row) {
  Vec x[2 * G];
  for (int i = 0; i < 2 * G; ++i) x[i] = Vec::load(scores + i * Vec::kLanes);
  Vec top[G];
  for (int g = 0; g < G; ++g) top[g] = max(x[2 * g], x[2 * g + 1]);
  for (int g = 1; g < G; ++g) top[0] = max(top[0], top[g]);
  if (any_above(top[0], Vec(softmax.max[row]))) raise_max(softmax, row, max(top[0]));
  const Vec m(softmax.max[row] == kMinusInfinity ? 0.0f : softmax.max[row]);
  float* sums = softmax.sums + row * Vec::kLanes;
  Vec total = Vec::load(sums);
  for (int g = 0; g < G; ++g) {
    const Vec low = exp2(x[2 * g] - m), high = exp2(x[2 * g + 1] - m);
    low.store(scores + g * kGroup);
    high.store(scores + g * kGroup + Vec::kLanes);
    total = total + (low + high);
  }
  total.store(sums);
}

QN_INLINE void softmax_row(const Block& block, Softmax& softmax, const Scratch& s, float* scores,
                           int row) {
  if (!block.visible_to_all) mask_row(block, s.keys_begin[row], s.keys_end[row], scores);
  switch (block.groups) {
    case 1:
      return softmax_row<1>(softmax, scores, row);
    case 2:
      return softmax_row<2>(softmax, scores, row);
    case 3:
      return softmax_row<3>(softmax, scores, row);
    default:
      static_assert(kGroups == 4);
      return softmax_row<4>(softmax, scores, row);
  }
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

/// c[r][0 .. 16 V) (+)= sum over i of a[r][i] * b[i][0 .. 16 V), i ascending. b_stride counts
/// columns; the rows of a bf16 or int8 b come in interleaved pairs.
template <typename T, int V, int R>
QN_INLINE void multiply_rows(const float* a, int64_t a_stride, const T* b, int64_t b_stride,
                             int64_t n, float* c, int64_t c_stride, bool accumulate) {
  Vec acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      acc[r][v] = accumulate ? Vec::load(c + r * c_stride + v * Vec::kLanes) : Vec::zero();
    }
  }
  for (int64_t i = 0; i < n; i += 2) {
    Vec even[V], odd[V];
    for (int v = 0; v < V; ++v) {
      if constexpr (sizeof(T) < 4) {
        load_pairs(b + i * b_stride + 2 * v * Vec::kLanes, even[v], odd[v]);
      } else {
        even[v] = Vec::load(b + i * b_stride + v * Vec::kLanes);
        odd[v] = Vec::load(b + (i + 1) * b_stride + v * Vec::kLanes);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) acc[r][v] = fma(Vec(a[r * a_stride + i]), even[v], acc[r][v]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(Vec(a[r * a_stride + i + 1]), odd[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v].store(c + r * c_stride + v * Vec::kLanes);
  }
}

// Accumulators in registers: 16 of 32 zmm, 12 of 16 ymm.
constexpr int kVecs = QN_ISA_LEVEL >= 2 ? 2 : 1;
constexpr int kRowBlock = QN_ISA_LEVEL >= 2 ? 8 : QN_ISA_LEVEL == 1 ? 6 : 4;

template <typename T, int V, int R = kRowBlock>
void multiply(int64_t rows, const float* a, int64_t a_stride, const T* b, int64_t b_stride,
              int64_t n, float* c, int64_t c_stride, bool accumulate) {
  for (; rows >= R; rows -= R) {
    multiply_rows<T, V, R>(a, a_stride, b, b_stride, n, c, c_stride, accumulate);
    a += R * a_stride;
    c += R * c_stride;
  }
  if constexpr (R > 1) {
    if (rows > 0) multiply<T, V, R - 1>(rows, a, a_stride, b, b_stride, n, c, c_stride, accumulate);
  }
}

/// The same of one row, bit for bit, with enough sums at a time for none to wait for another: those
/// of V Vecs of each of G matrices, whose results lie behind each other.
template <typename T, int G, int V>
QN_INLINE void multiply_one_row(const float* a, const T* const* b, int64_t b_stride, int64_t n,
                                float* c, bool accumulate) {
  constexpr int kPairs = sizeof(T) < 4 ? 2 : 1;
  Vec acc[G * V];
  for (int v = 0; v < G * V; ++v) {
    acc[v] = accumulate ? Vec::load(c + v * Vec::kLanes) : Vec::zero();
  }
  for (int64_t i = 0; i < n; i += kPairs) {
#pragma GCC unroll 8
    for (int v = 0; v < G * V; ++v) {
      const T* const at = b[v / V] + i * b_stride + kPairs * (v % V) * Vec::kLanes;
      if constexpr (kPairs == 2) {
        Vec even, odd;
        load_pairs(at, even, odd);
        acc[v] = fma(Vec(a[i + 1]), odd, fma(Vec(a[i]), even, acc[v]));
      } else {
        acc[v] = fma(Vec(a[i]), Vec::load(at), acc[v]);
      }
    }
  }
  for (int v = 0; v < G * V; ++v) acc[v].store(c + v * Vec::kLanes);
}

/// The path with fma. T: f32 or bf16 pages; int8 ones are widened to bf16 for many rows, and
/// for few in registers.
template <typename T>
struct VecPath {
  static void load_query(const float* q, Vec scale, int64_t head_dim, int row, const AttentionItem&,
                         Scratch& s) {
    memcpy(s.query + row * head_dim, q, static_cast<size_t>(head_dim) * sizeof(float));
    scale.store(s.scale[row]);
  }

  static void run(const AttentionArgs& a, const AttentionItem& item, Scratch& s,
                  const PartResults& results) {
    const BlockRange range = blocks_of(item, s);
    const bool int8 = a.kv.dtype == DType::I8;
    const bool in_registers = int8 && item.rows <= kRowBlock;
    Softmax& softmax = s.softmax[0];
    for (int64_t index = range.begin; index < range.end; ++index) {
      Block block = locate(a, item, s, range, index);
      if (int8 && !in_registers) {
        widen(kGroup * key_dims(a.kv), block.groups, block.keys, s.keys);
        widen(kGroup * a.kv.head_dim, block.groups, block.values, s.values);
      }
      if (block.starts_part) start_part(softmax, item.rows);
      start_block(softmax, item.rows);
      if (in_registers) {
        multiply_keys<int8_t>(a, item, block, s);
      } else {
        multiply_keys<T>(a, item, block, s);
      }
      for (int r = 0; r < item.rows; ++r) {
        float* scores = s.scores[0] + r * kScoreStride;
        scale_row(block, s.scale[r], scores);
        if (int8) scale_by_key(block, block.key_scales, scores);
        softmax_row(block, softmax, s, scores, r);
        if (int8) scale_by_key(block, block.value_scales, scores);
      }
      if (!block.starts_part) {
        rescale_rows(softmax, item.rows, a.kv.head_dim, results.out(block));
      }
      float* const out = results.out(block);
      if (in_registers) {
        multiply_values<int8_t>(a, item, block, s, out);
      } else {
        multiply_values<T>(a, item, block, s, out);
      }
      if (block.ends_part) results.finish(block, softmax);
    }
  }

 private:
  /// The codes of int8 pages as bf16, which hold them exactly, in the same order.
  static void widen(int64_t codes, int groups, const char** block, bf16* wide) {
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

  /// Rounds the scaled scores, so that the largest one differs from itself by an exact zero.
  __attribute__((noinline)) static void scale_row(const Block& block, const float* scale,
                                                  float* scores) {
    for (int key = 0; key < block.groups * kGroup; key += Vec::kLanes) {
      (Vec::load(scores + key) * Vec::load(scale)).store(scores + key);
    }
  }

  static constexpr int kStep = kVecs * Vec::kLanes;
  static constexpr int kSums = QN_ISA_LEVEL >= 2 ? 8 : 4;  // Vecs of one row in registers

  template <typename U>
  static void multiply_keys(const AttentionArgs& a, const AttentionItem& item, const Block& block,
                            Scratch& s) {
    constexpr int kInterleave = sizeof(U) < 4 ? 2 : 1, kVecsOfGroup = kGroup / Vec::kLanes;
    const U* keys[kGroups];
    for (int g = 0; g < block.groups; ++g) keys[g] = reinterpret_cast<const U*>(block.keys[g]);
    int g = 0;
    if (item.rows == 1) {
      constexpr int kTogether = kSums / kVecsOfGroup;
      for (; g + kTogether <= block.groups; g += kTogether) {
        multiply_one_row<U, kTogether, kVecsOfGroup>(
            s.query, keys + g, key_stride(a.kv), a.kv.head_dim, s.scores[0] + g * kGroup, false);
      }
    }
    for (; g < block.groups; ++g) {
      for (int key = 0; key < kGroup; key += kStep) {
        multiply<U, kVecs>(item.rows, s.query, a.kv.head_dim, keys[g] + key * kInterleave,
                           key_stride(a.kv), a.kv.head_dim, s.scores[0] + g * kGroup + key,
                           kScoreStride, false);
      }
    }
  }

  template <typename U>
  static void multiply_values(const AttentionArgs& a, const AttentionItem& item, const Block& block,
                              const Scratch& s, float* out) {
    constexpr int kInterleave = sizeof(U) < 4 ? 2 : 1, kMost = kSums * Vec::kLanes;
    const int64_t head_dim = a.kv.head_dim;
    for (int g = 0; g < block.groups; ++g) {
      const U* values = reinterpret_cast<const U*>(block.values[g]);
      const float* probs = s.scores[0] + g * kGroup;
      const bool accumulate = g > 0 || !block.starts_part;
      int64_t dim = 0;
      for (; item.rows == 1 && dim + kMost <= head_dim; dim += kMost) {
        const U* const columns = values + dim * kInterleave;
        multiply_one_row<U, 1, kSums>(probs, &columns, head_dim, kGroup, out + dim, accumulate);
      }
      for (; dim + kStep <= head_dim; dim += kStep) {
        multiply<U, kVecs>(item.rows, probs, kScoreStride, values + dim * kInterleave, head_dim,
                           kGroup, out + dim, head_dim, accumulate);
      }
      for (; dim < head_dim; dim += Vec::kLanes) {
        multiply<U, 1>(item.rows, probs, kScoreStride, values + dim * kInterleave, head_dim, kGroup,
                       out + dim, head_dim, accumulate);
      }
    }
  }
};

#if QN_ISA_LEVEL >= 3
/// Where the keys or values of the block's g-th group are; beyond its end, of the next block's.
const char* ahead(const char* const (Block::*of)[kGroups], const Block& block, const Block& next,
                  int g) {
  if (g < block.groups) return (block.*of)[g];
  if (next.groups == 0) return (block.*of)[block.groups - 1];
  g -= block.groups;
  return (next.*of)[g < next.groups ? g : next.groups - 1];
}

/// The products of a single row, by fma, with the bits that tiles give. A tile with one row does a
/// sixteenth of its work and waits for memory all the same, since the processor does not read
/// ahead of its strided loads; here every line is read once, in order, and asked for in time.
///
/// tdpbf16ps sums the products of even and of odd columns apart, rounds each sum once per product,
/// and takes denormals as zeros, also in its results.
struct OneRow {
  static constexpr int kDepth = 32;  // columns of a tile, in pairs

  /// Denormals are zeros while this lives. What computes has to be a call, so that the compiler
  /// leaves it in between.
  class NoDenormals {
   public:
    NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before_); }
    NoDenormals(const NoDenormals&) = delete;
    NoDenormals& operator=(const NoDenormals&) = delete;

   private:
    unsigned before_;
  };

  template <int N>
  struct Count {
    static constexpr int value = N;
  };

  /// Calls fn(first tile, how many of them) for steps of kMost tiles, then of fewer.
  template <int kMost, class Fn>
  static QN_INLINE void for_tiles(int begin, int end, const Fn& fn) {
    for (; begin + kMost <= end; begin += kMost) fn(begin, Count<kMost>{});
    if constexpr (kMost > 1) for_tiles<kMost / 2>(begin, end, fn);
  }

  /// c [16 T] (+)= a [32] * T tiles side by side; at(t, i) is where the i-th row of pairs of one
  /// is.
  template <DType kDType, int T, class At>
  static QN_INLINE void multiply(const float* a, const At& at, float* c, bool accumulate) {
    Vec even[T], odd[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) even[t] = odd[t] = Vec::zero();
    for (int i = 0; i < kDepth / 2; ++i) {
      const Vec a_even(a[2 * i]), a_odd(a[2 * i + 1]);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        Vec b_even, b_odd;
        read_pairs<kDType>(at(t, i), b_even, b_odd);
        even[t] = fma(a_even, b_even, even[t]);
        odd[t] = fma(a_odd, b_odd, odd[t]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      float* const out = c + t * Vec::kLanes;
      const Vec before = accumulate ? Vec::load(out) : Vec::zero();
      (before + (even[t] + odd[t])).store(out);
    }
  }

  /// The even and the odd ones of 32 keys or values of pages of a type.
  template <DType kDType>
  static QN_INLINE void read_pairs(const char* p, Vec& even, Vec& odd) {
    if constexpr (kDType == DType::I8) {
      load_pairs(reinterpret_cast<const int8_t*>(p), even, odd);
    } else {
      load_pairs(reinterpret_cast<const bf16*>(p), even, odd);
    }
  }

  /// scores = q k^T of one block; query [depths][32]. `next` follows the block.
  template <DType kDType>
  static __attribute__((noinline)) void multiply_keys(const float* query, int64_t depths,
                                                      const Block& block, const Block& next,
                                                      float* scores) {
    constexpr int64_t kTileBytes = kDType == DType::I8 ? 32 : 64;
    for_tiles<2>(0, block.groups, [&](int g, auto groups) {
      constexpr int kTiles = 2 * groups.value;
      const char *keys[groups.value], *after[groups.value];
      for (int i = 0; i < groups.value; ++i) {
        keys[i] = block.keys[g + i];
        after[i] = ahead(&Block::keys, block, next, g + groups.value + i);
      }
      for (int64_t d = 0; d < depths; ++d) {
        const auto at = [&](int t, int i) {
          const int64_t offset = ((d * (kDepth / 2) + i) * 2 + t % 2) * kTileBytes;
          if (offset % 64 == 0) __builtin_prefetch(after[t / 2] + offset, 0, 3);
          return keys[t / 2] + offset;
        };
        multiply<kDType, kTiles>(query + d * kDepth, at, scores + g * kGroup, d > 0);
      }
    });
  }

  /// out [head_dim] (+)= p v of one block; probs [group][prob_stride].
  template <DType kDType>
  static __attribute__((noinline)) void multiply_values(const bf16* probs, int64_t prob_stride,
                                                        int64_t head_dim, const Block& block,
                                                        const Block& next, float* out) {
    constexpr int64_t kTileBytes = kDType == DType::I8 ? 32 : 64;
    const int64_t stride = head_dim / Vec::kLanes * kTileBytes;
    for (int g = 0; g < block.groups; ++g, probs += prob_stride) {
      const char* const values = block.values[g];
      const char* const after = ahead(&Block::values, block, next, g + 1);
      float p[kDepth];
      for (int i = 0; i < kDepth; ++i) p[i] = math::QN_ISA::bf16_to_float(probs[i]);
      for_tiles<8>(0, static_cast<int>(head_dim / Vec::kLanes), [&](int tile, auto tiles) {
        const auto at = [&](int t, int i) {
          const int64_t offset = i * stride + (tile + t) * kTileBytes;
          if (t * kTileBytes % 64 == 0) __builtin_prefetch(after + offset, 0, 3);
          return values + offset;
        };
        multiply<kDType, tiles.value>(p, at, out + tile * Vec::kLanes, g > 0 || !block.starts_part);
      });
    }
  }
};

/// The path with tiles, for bf16 pages. Tiles 0 and 1 accumulate, 4 holds 16 rows of queries or
/// probabilities, 6 comes from the cache: four tile registers, since more would be slow beside a
/// busy hyperthread (amx_tile.h).
///
/// While the vector units turn block b into probabilities, the tiles multiply the keys of block
/// b + 1 and the values of block b - 1: a row follows every step or every other step of the tiles.
///
/// m is a whole number, so that rescaling rounds nothing, and stays where a part's first block puts
/// it until a score exceeds it by kHeadroom.
struct TilePath {
  static constexpr float kHeadroom = 16;
  static constexpr int kDepth = 32;                            // dims or keys of one multiplication
  static constexpr int kProbStride = kAttentionRows * kDepth;  // [group][row][32 keys]

  /// Probabilities p = 2^(s - m - kHeadroom) of a row's block as bf16, and its sum so far with
  /// them: what is multiplied with the values is what is summed.
  ///
  /// Works in 16-bit fixed point. With y = s - m - kHeadroom and u its fraction less 1/2, four
  /// times the bits of a bf16 p are about 512 (y + 127 + c (u^2 + e u - 1/4)), c = 0.34, the square
  /// correcting 1 + fraction to 2^fraction; `below` is 512 (1/2 - y). The relative error is 1.9e-3
  /// in the mean square and 6e-3 at most, where the nearest bf16 have 1.7e-3 and 4e-3. 0 from about
  /// 2^-126 on down. y > 0, NaN and what is out of the range of int32 give p > 1, which the caller
  /// sees in the sum.
  template <int G>
  static QN_INLINE Vec probs_of(const float* scores, float offset, Vec total, bf16* probs) {
    constexpr int kCorrection = 87, kSkew = 1400;  // 256 c, 65536 e
    const __m512 steps = _mm512_set1_ps(kSteps), start = _mm512_set1_ps(offset);
    const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512i skew = _mm512_set1_epi16(kSkew), correction = _mm512_set1_epi16(kCorrection);
    const __m512i one_and_half =
        _mm512_set1_epi16(static_cast<int16_t>(512 * 127 + 256 + 2 - (kCorrection + 1) / 2));
    const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    const auto below_one = [&](const float* s) {
      return _mm512_cvtps_epi32(_mm512_fnmadd_ps(_mm512_load_ps(s), steps, start));
    };
    for (int g = 0; g < G; ++g, scores += kGroup, probs += kProbStride) {
      const __m512i below = _mm512_permutexvar_epi64(
          in_order, _mm512_packus_epi32(below_one(scores), below_one(scores + Vec::kLanes)));
      const __m512i u = _mm512_slli_epi16(below, 7);
      const __m512i square =
          _mm512_mulhrs_epi16(_mm512_mulhi_epi16(u, _mm512_adds_epi16(u, skew)), correction);
      const __m512i bits =
          _mm512_srli_epi16(_mm512_subs_epu16(one_and_half, _mm512_subs_epu16(below, square)), 2);
      _mm512_store_si512(probs, bits);
      total = _mm512_dpbf16_ps(total.v, reinterpret_cast<__m512bh>(bits), ones);
    }
    return total;
  }

  static QN_INLINE void narrow(Vec low, Vec high, bf16* wide) {
    _mm512_storeu_si512(wide, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
  }

  /// 32 codes as bf16, exactly, in 2 cycles, where float32 in between takes 4. An integer as fp16
  /// has the bits s eeeee mmmmmm...., and with bf16's bias that becomes s e4 e3 e3 e3 e3 e2 e1 e0
  /// mmmmmm.: shifted right by three, only the upper byte needs mending, and each of its bits is
  /// one of before, since e is 0 or 15 to 22.
  static QN_INLINE void widen(const char* codes, char* wide) {
    const __m512i c =
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i half = _mm512_srai_epi16(_mm512_castph_si512(_mm512_cvtepi16_ph(c)), 3);
    const __m512i exponent = _mm512_set1_epi64(0x0102040404040880);
    _mm512_storeu_si512(
        wide, _mm512_mask_gf2p8affine_epi64_epi8(half, 0xaaaaaaaaaaaaaaaa, half, exponent, 0));
  }

  /// The scales of a block's values and their inverses, 1 for a value of zeros.
  static void load_value_scales(const Block& block, Scratch& s) {
    for (int key = 0; key < block.groups * kGroup; key += Vec::kLanes) {
      const __m512 one = _mm512_set1_ps(1.0f);
      __m512 scale = _mm512_loadu_ps(block.value_scales[key / kGroup] + key % kGroup);
      const __mmask16 zero = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_EQ_OQ);
      scale = _mm512_mask_mov_ps(scale, zero, one);
      _mm512_store_ps(s.value_scales + key, scale);
      _mm512_store_ps(s.inverse_scales + key, _mm512_div_ps(one, scale));
    }
  }

  /// The probabilities of a row's block times the scales of the values, and the sum so far with
  /// them: without the scales, but of what they were rounded to.
  static __attribute__((noinline)) Vec scale_probs(int groups, const Scratch& s, Vec total,
                                                   bf16* probs) {
    const float *scales = s.value_scales, *inverse = s.inverse_scales;
    for (int g = 0; g < groups; ++g, probs += kProbStride) {
      narrow(Vec::load(probs) * Vec::load(scales),
             Vec::load(probs + Vec::kLanes) * Vec::load(scales + Vec::kLanes), probs);
      total = fma(Vec::load(probs), Vec::load(inverse), total);
      total = fma(Vec::load(probs + Vec::kLanes), Vec::load(inverse + Vec::kLanes), total);
      scales += kGroup;
      inverse += kGroup;
    }
    return total;
  }

  /// Packed [head_dim / 32][rows][32]; the last step is filled up with zeros.
  static void load_query(const float* q, Vec scale, int64_t head_dim, int row,
                         const AttentionItem& item, Scratch& s) {
    bf16* packed = reinterpret_cast<bf16*>(s.query) + row * kDepth;
    for (int64_t dim = 0; dim < head_dim; dim += kDepth) {
      bf16* step = packed + dim * item.rows;
      const Vec low = Vec::load(q + dim) * scale;
      const Vec high = dim + 16 < head_dim ? Vec::load(q + dim + 16) * scale : Vec::zero();
      narrow(low, high, step);
    }
  }

  /// More than 16 rows are filled up to 32, in the scratch and in the item's partial results.
  static TileConfig tile_config(const AttentionItem& item) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = tile < 6 && item.rows < 16 ? static_cast<uint8_t>(item.rows) : 16;
      config.row_bytes[tile] = 64;
    }
    return config;
  }

  static void run(const AttentionArgs& a, const AttentionItem& item, Scratch& s,
                  const PartResults& results) {
    if (a.kv.dtype == DType::I8) {
      if (item.rows == 1) return run_one_row<DType::I8>(a, item, s, results);
      return item.rows > 16 ? run<2, true>(a, item, s, results) : run<1, true>(a, item, s, results);
    }
    if (item.rows == 1) return run_one_row<DType::BF16>(a, item, s, results);
    item.rows > 16 ? run<2, false>(a, item, s, results) : run<1, false>(a, item, s, results);
  }

 private:
  static constexpr float kSteps = 512.0f;  // of fixed point

  static QN_INLINE void set_max(Softmax& softmax, int row, float top) {
    softmax.max[row] = __builtin_ceilf(top);
    softmax.offset[row] = kSteps * (softmax.max[row] + kHeadroom + 0.5f);
  }

  /// What most rows need not: masks a row's scores, sets m if the row has none, raises it if asked
  /// to, and limits the scores to what probs_of converts. False if the row sees nothing yet.
  static __attribute__((noinline)) bool prepare_row(const Block& block, Softmax& softmax,
                                                    const Scratch& s, float* scores, int row,
                                                    bool raise) {
    const auto lanes_before = [](int64_t key) {
      return key <= 0 ? 0u : key >= Vec::kLanes ? 0xffffu : (1u << key) - 1u;
    };
    const int count = block.groups * kGroup;
    __m512 top = _mm512_set1_ps(kMinusInfinity);
    __mmask16 is_nan = 0;
    for (int key = 0; key < count; key += Vec::kLanes) {
      const int64_t position = block.first_key + key;
      const auto seen = static_cast<__mmask16>(lanes_before(s.keys_end[row] - position) &
                                               ~lanes_before(s.keys_begin[row] - position));
      const __m512 x = _mm512_mask_load_ps(_mm512_set1_ps(kMinusInfinity), seen, scores + key);
      is_nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      top = _mm512_max_ps(top, x);
      _mm512_store_ps(scores + key, x);
    }
    const float largest = max(Vec(top)), old = softmax.max[row];
    if (is_nan != 0 || largest == -kMinusInfinity) {
      Vec(__builtin_nanf("")).store(softmax.sums + row * Vec::kLanes);
      set_max(softmax, row, 0);
    } else if (old == kMinusInfinity) {
      if (largest == kMinusInfinity) return false;
      set_max(softmax, row, largest);
    } else if (raise && largest > old) {
      raise_max(softmax, row, __builtin_ceilf(largest));
      set_max(softmax, row, softmax.max[row]);
    }
    const Vec least(softmax.max[row] - 128.0f);
    for (int key = 0; key < count; key += Vec::kLanes) {
      max(Vec::load(scores + key), least).store(scores + key);
    }
    return true;
  }

  /// Turns a row's scores of one block into probabilities.
  template <int G>
  static QN_INLINE void softmax_groups(const Block& block, Softmax& softmax, const Scratch& s,
                                       bool int8, float* scores, int row, bf16* probs) {
    if (int8) scale_by_key(block, block.key_scales, scores);
    const auto sees_nothing = [&] {
      for (int g = 0; g < G; ++g) memset(probs + g * kProbStride, 0, kDepth * sizeof(bf16));
    };
    if (!block.visible_to_all) {
      if (!prepare_row(block, softmax, s, scores, row, false)) return sees_nothing();
    } else if (softmax.max[row] == kMinusInfinity) {
      Vec top = Vec::load(scores);
      for (int i = 1; i < 2 * G; ++i) top = max(top, Vec::load(scores + i * Vec::kLanes));
      set_max(softmax, row, max(top));
    }
    float* const sums = softmax.sums + row * Vec::kLanes;
    Vec total = probs_of<G>(scores, softmax.offset[row], Vec::load(sums), probs);
    if (_mm512_cmp_ps_mask(total.v, _mm512_set1_ps(1.0f), _CMP_NLT_UQ) != 0) [[unlikely]] {
      if (!prepare_row(block, softmax, s, scores, row, true)) return sees_nothing();
      total = probs_of<G>(scores, softmax.offset[row], Vec::load(sums), probs);
    }
    if (int8) total = scale_probs(G, s, Vec::load(sums), probs);
    total.store(sums);
  }

  struct NoRows {
    QN_INLINE void next() {}
  };

  /// The rows of a block, for the softmax of one after the other. kWhole: the block has all groups.
  template <bool kWhole>
  struct Rows {
    const Block& block;
    Softmax& softmax;
    const Scratch& s;
    float* scores;
    bf16* probs;
    int count;
    bool int8;
    int done = 0;

    QN_INLINE void next() {
      if (done == count) return;
      float* const row_scores = scores + done * kScoreStride;
      bf16* const row_probs = probs + done * kDepth;
      if constexpr (kWhole) {
        softmax_groups<kGroups>(block, softmax, s, int8, row_scores, done, row_probs);
      } else if (block.groups == 1) {
        softmax_groups<1>(block, softmax, s, int8, row_scores, done, row_probs);
      } else if (block.groups == 2) {
        softmax_groups<2>(block, softmax, s, int8, row_scores, done, row_probs);
      } else {
        static_assert(kGroups == 4);
        softmax_groups<3>(block, softmax, s, int8, row_scores, done, row_probs);
      }
      ++done;
    }
  };

  /// c [16 M rows, 16] += a [rows, 32] * b [16 pairs, 16]
  template <int M>
  static QN_INLINE void multiply_tiles(const char* a, const char* b, int64_t b_stride) {
    _tile_loadd(6, b, b_stride);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (M > 1) {
      _tile_loadd(4, a + 16 * 64, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
  }

  template <int M>
  static QN_INLINE void zero_tiles() {
    _tile_zero(0);
    if constexpr (M > 1) _tile_zero(1);
  }

  template <int M>
  static QN_INLINE void load_tiles(const float* c, int64_t stride) {
    _tile_loadd(0, c, stride);
    if constexpr (M > 1) _tile_loadd(1, c + 4 * stride, stride);
  }

  template <int M>
  static QN_INLINE void store_tiles(float* c, int64_t stride) {
    _tile_stored(0, c, stride);
    if constexpr (M > 1) _tile_stored(1, c + 4 * stride, stride);
  }

  /// The keys or values of a block as tiles take them, one group after the other.
  ///
  /// Every multiplication is followed by the work on a kilobyte that comes later: of int8 pages a
  /// piece of the next group is widened, and of pages that no other item reads the next block is
  /// asked for in the order of its addresses, since the processor does not read ahead of the
  /// strided loads of tiles. `begin` comes first, `advance(g)` after each multiplication with
  /// group(g), of which there is one for each kilobyte.
  template <bool kInt8>
  struct Feed {
    static constexpr int64_t kPiece = 1024;
    const char* const* groups;
    const char* const* next;  // the next block's
    int count, next_count;
    int64_t bytes;  // of a group as bf16
    char* wide;     // two groups of int8 pages
    int64_t at = 0;

    QN_INLINE void begin() {
      if constexpr (kInt8) {
        for (; at < bytes; at += kPiece) widen_piece(0);
        at = 0;
      }
    }
    QN_INLINE const char* group(int g) const {
      if constexpr (kInt8) return wide + g % 2 * bytes;
      return groups[g];
    }
    QN_INLINE void advance(int g) {
      if constexpr (kInt8) {
        if (g + 1 < count) widen_piece(g + 1);
        at += kPiece;
        if (at == bytes) at = 0;
      } else if (next_count > 0) {
        for (int64_t i = 0; i < kPiece; i += 64) __builtin_prefetch(*next + at + i, 0, 3);
        at += kPiece;
        if (at == bytes) {
          at = 0;
          ++next;
          --next_count;
        }
      }
    }

   private:
    QN_INLINE void widen_piece(int g) {
      const char* const codes = groups[g] + at / 2;
      const char* const later = next_count > g ? next[g] + at / 2 : codes;
      char* const to = wide + g % 2 * bytes + at;
      for (int i = 0; i < kPiece; i += 128) {
        __builtin_prefetch(later + i / 2, 0, 3);
        widen(codes + i / 2, to + i);
        widen(codes + i / 2 + 32, to + i + 64);
      }
    }
  };

  /// scores = q k^T of one block. kDepths: multiplications that head_dim takes, 0 if any number.
  template <int M, int kDepths, class Keys, class RowWork>
  static QN_INLINE void multiply_keys(const AttentionArgs& a, const AttentionItem& item,
                                      const Scratch& s, Keys keys, float* scores, RowWork& rows) {
    constexpr int64_t kStride = kGroup * 4;
    const int64_t query_step = item.rows * 64;
    const int64_t depths = kDepths > 0 ? kDepths : (a.kv.head_dim + kDepth - 1) / kDepth;
    const char* const query = reinterpret_cast<const char*>(s.query);
    keys.begin();
    for (int g = 0; g < keys.count; ++g) {
      for (int half = 0; half < 2; ++half, scores += Vec::kLanes) {
        const char* const tiles = keys.group(g) + half * 64;
        zero_tiles<M>();
        for (int64_t d = 0; d < depths; ++d) {
          multiply_tiles<M>(query + d * query_step, tiles + d * 16 * kStride, kStride);
          keys.advance(g);
          if (kDepths <= 2 || d % 2 == 1) rows.next();
        }
        store_tiles<M>(scores, kScoreStride * 4);
      }
    }
  }

  /// out (+)= p v of one block.
  template <int M, int kDepths, bool kInt8, class RowWork>
  static QN_INLINE void multiply_values(const AttentionArgs& a, Feed<kInt8> values, bool accumulate,
                                        const bf16* probs, float* out, RowWork& rows) {
    const int64_t head_dim = kDepths > 0 ? kDepths * kDepth : a.kv.head_dim;
    const int64_t stride = head_dim * 4;
    const auto begin = [&](int64_t dim, bool more) {
      more ? load_tiles<M>(out + dim, stride) : zero_tiles<M>();
    };
    const auto multiply = [&](int64_t dim, int g) __attribute__((always_inline)) {
      multiply_tiles<M>(reinterpret_cast<const char*>(probs + g * kProbStride),
                        values.group(g) + dim * 4, stride);
      values.advance(g);
    };
    values.begin();
    if constexpr (kInt8) {  // two groups are there at a time
      for (int g = 0; g < values.count; ++g) {
        for (int64_t dim = 0; dim < head_dim; dim += Vec::kLanes) {
          begin(dim, accumulate || g > 0);
          multiply(dim, g);
          if (kDepths <= 2 || dim / Vec::kLanes % 2 == 1) rows.next();
          store_tiles<M>(out + dim, stride);
        }
      }
    } else {
      for (int64_t dim = 0; dim < head_dim; dim += Vec::kLanes) {
        begin(dim, accumulate);
        for (int g = 0; g < values.count; ++g) {
          multiply(dim, g);
          if (kDepths <= 2 || g % 2 == 1) rows.next();
        }
        store_tiles<M>(out + dim, stride);
      }
    }
  }

  /// The same arithmetic on one block after the other.
  template <DType kDType>
  static __attribute__((noinline)) void run_one_row(const AttentionArgs& a,
                                                    const AttentionItem& item, Scratch& s,
                                                    const PartResults& results) {
    const int64_t head_dim = a.kv.head_dim, depths = (head_dim + kDepth - 1) / kDepth;
    const bf16* const packed = reinterpret_cast<const bf16*>(s.query);
    float query[kAttentionMaxHeadDim];
    for (int64_t i = 0; i < depths * kDepth; ++i) query[i] = math::QN_ISA::bf16_to_float(packed[i]);
    constexpr bool kInt8 = kDType == DType::I8;
    const BlockRange range = blocks_of(item, s);
    Softmax& softmax = s.softmax[0];
    Block block{}, next{};
    if (range.begin < range.end) next = locate(a, item, s, range, range.begin);
    for (int64_t index = range.begin; index < range.end; ++index) {
      block = next;
      next.groups = 0;
      if (index + 1 < range.end) next = locate(a, item, s, range, index + 1);
      float* const scores = s.scores[0];
      {
        const OneRow::NoDenormals as_tiles;
        OneRow::multiply_keys<kDType>(query, depths, block, next, scores);
      }
      if (block.starts_part) start_part(softmax, 1);
      start_block(softmax, 1);
      if constexpr (kInt8) load_value_scales(block, s);
      if (block.groups == kGroups) {
        Rows<true>{block, softmax, s, scores, s.probs[0], 1, kInt8}.next();
      } else {
        Rows<false>{block, softmax, s, scores, s.probs[0], 1, kInt8}.next();
      }
      float* const out = results.out(block);
      if (!block.starts_part) rescale_rows(softmax, 1, head_dim, out);
      {
        const OneRow::NoDenormals as_tiles;
        OneRow::multiply_values<kDType>(s.probs[0], kProbStride, head_dim, block, next, out);
      }
      if (block.ends_part) results.finish(block, softmax);
    }
  }

  template <int M, bool kInt8>
  static void run(const AttentionArgs& a, const AttentionItem& item, Scratch& s,
                  const PartResults& results) {
    switch (a.kv.head_dim) {
      case 64:
        return run<M, kInt8, 2>(a, item, s, results);
      case 128:
        return run<M, kInt8, 4>(a, item, s, results);
      default:
        return run<M, kInt8, 0>(a, item, s, results);
    }
  }

  template <int M, bool kInt8, int kDepths>
  static void run(const AttentionArgs& a, const AttentionItem& item, Scratch& s,
                  const PartResults& results) {
    const BlockRange range = blocks_of(item, s);
    if (range.begin >= range.end) return;
    Block blocks[4];  // by index % 4: the previous one, the one in softmax, the next two
    const auto block_at = [&](int64_t index) -> Block& { return blocks[index % 4]; };
    const auto locate_at = [&](int64_t index) {
      Block& block = block_at(index);
      block.groups = 0;
      if (index < range.end) block = locate(a, item, s, range, index);
    };
    const bool alone = item.rows < kAttentionRows;  // else other items are likely to read the same
    const auto multiply_keys_of = [&](int64_t index, auto& rows) __attribute__((always_inline)) {
      locate_at(index + 1);
      const Block &block = block_at(index), &next = block_at(index + 1);
      const Feed<kInt8> keys{block.keys,
                             next.keys,
                             block.groups,
                             alone ? next.groups : 0,
                             2 * kGroup * key_dims(a.kv),
                             reinterpret_cast<char*>(s.keys)};
      multiply_keys<M, kDepths>(a, item, s, keys, s.scores[index % 2], rows);
    };
    const auto multiply_values_of = [&](int64_t index, auto& rows) __attribute__((always_inline)) {
      const Block &block = block_at(index), &next = block_at(index + 1);
      const Feed<kInt8> values{block.values,
                               next.values,
                               block.groups,
                               alone ? next.groups : 0,
                               2 * kGroup * a.kv.head_dim,
                               reinterpret_cast<char*>(s.values)};
      multiply_values<M, kDepths>(a, values, !block.starts_part, s.probs[index % 2],
                                  results.out(block), rows);
    };
    locate_at(range.begin);
    NoRows no_rows;
    multiply_keys_of(range.begin, no_rows);
    const Softmax* previous_softmax = nullptr;
    for (int64_t index = range.begin; index < range.end; ++index) {
      const Block& block = block_at(index);
      const Block* previous = index > range.begin ? &block_at(index - 1) : nullptr;
      Softmax& softmax = s.softmax[block.first_key / kAttentionPart % 2];
      if (block.starts_part) start_part(softmax, item.rows);
      start_block(softmax, item.rows);
      if constexpr (kInt8) load_value_scales(block, s);
      const auto run_rows = [&](auto rows) __attribute__((always_inline)) {
        if (index + 1 < range.end) multiply_keys_of(index + 1, rows);
        if (previous) multiply_values_of(index - 1, rows);
        while (rows.done < rows.count) rows.next();
      };
      float* const scores = s.scores[index % 2];
      bf16* const probs = s.probs[index % 2];
      if (block.groups == kGroups) {
        run_rows(Rows<true>{block, softmax, s, scores, probs, item.rows, kInt8});
      } else {
        run_rows(Rows<false>{block, softmax, s, scores, probs, item.rows, kInt8});
      }
      if (previous && previous->ends_part) results.finish(*previous, *previous_softmax);
      if (!block.starts_part) {
        rescale_rows(softmax, item.rows, a.kv.head_dim, results.out(block));
      }
      previous_softmax = &softmax;
    }
    multiply_values_of(range.end - 1, no_rows);
    results.finish(block_at(range.end - 1), *previous_softmax);
  }
};
#endif

template <typename Path>
void run_item(const AttentionArgs& a, const AttentionItem& item, Scratch& s) {
  constexpr float kLog2E = 1.44269504f;
  for (int r = 0; r < item.rows; ++r) {
    const int64_t row = item.first_row + r, token = row / a.group;
    const int64_t head = item.kv_head * a.group + row % a.group;
    const float factor = a.query_scale ? a.query_scale[item.token + token] : 1.0f;
    const float* q = a.q + (item.token + token) * a.q_stride + head * a.q_head_stride;
    float multiplied[kAttentionMaxHeadDim];
    if (a.key_scale != nullptr) {
      const float* key_scale = a.key_scale + item.kv_head * a.kv.head_dim;
      for (int64_t dim = 0; dim < a.kv.head_dim; dim += Vec::kLanes) {
        (Vec::load(q + dim) * Vec::load(key_scale + dim)).store(multiplied + dim);
      }
      q = multiplied;
    }
    Path::load_query(q, Vec(a.scale * factor * kLog2E), a.kv.head_dim, r, item, s);
    s.keys_end[r] = item.position + token + 1;
    s.keys_begin[r] = a.window > 0 ? greatest(s.keys_end[r] - a.window, 0) : 0;
    s.total_sum[r] = 0;
  }
  Path::run(a, item, s, PartResults{a, item, s});
  if (item.partial == nullptr) {
    write_out(a, item, {s.total_out, s.total_max, s.total_sum});
  }
}

}  // namespace

void attention(const AttentionArgs& args, int64_t begin, int64_t end, void* scratch) {
  Scratch& s = *static_cast<Scratch*>(scratch);
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem& item = args.items[i];
    if (args.kv.dtype == DType::F32) {
      run_item<VecPath<float>>(args, item, s);
      continue;
    }
#if QN_ISA_LEVEL >= 3
    const TileScope tiles(TilePath::tile_config(item));
    run_item<TilePath>(args, item, s);
#else
    run_item<VecPath<bf16>>(args, item, s);
#endif
  }
}

void attention_merge(const AttentionArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem& item = args.items[i];
    const auto part = [&](int64_t index) {
      float* const max = item.partial + index * item.partial_stride;
      float* const sum = max + kAttentionRows;
      return Partial{sum + kAttentionRows, max, sum};
    };
    for (int32_t index = 1; index < item.part_end - item.part_begin; ++index) {
      merge(part(0), part(index), item.rows, args.kv.head_dim);
    }
    write_out(args, item, part(0));
  }
}

}  // namespace qn::cpu::QN_ISA
