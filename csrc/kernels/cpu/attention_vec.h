// Attention with fma on Vec, for pages of every type.
#pragma once
#include "kernels/cpu/attention_block.h"

namespace qn::cpu::QN_ISA {
namespace {

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

/// The same of up to R rows.
template <typename T, int V, int R>
QN_INLINE void multiply_pass(int64_t rows, const float* a, int64_t a_stride, const T* b,
                             int64_t b_stride, int64_t n, float* c, int64_t c_stride,
                             bool accumulate) {
  if (rows == R) {
    multiply_rows<T, V, R>(a, a_stride, b, b_stride, n, c, c_stride, accumulate);
  } else if constexpr (R > 1) {
    multiply_pass<T, V, R - 1>(rows, a, a_stride, b, b_stride, n, c, c_stride, accumulate);
  }
}

/// The same for any number of rows, in passes of nearly as many each.
template <typename T, int V>
void multiply(int64_t rows, const float* a, int64_t a_stride, const T* b, int64_t b_stride,
              int64_t n, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t passes = (rows + kRowBlock - 1) / kRowBlock; passes > 0; --passes) {
    const int64_t count = (rows + passes - 1) / passes;
    multiply_pass<T, V, kRowBlock>(count, a, a_stride, b, b_stride, n, c, c_stride, accumulate);
    rows -= count;
    a += count * a_stride;
    c += count * c_stride;
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
        widen_codes(kGroup * key_dims(a.kv), block.groups, block.keys, s.keys);
        widen_codes(kGroup * a.kv.head_dim, block.groups, block.values, s.values);
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
  /// Rounds the scaled scores, so that the largest one differs from itself by an exact zero.
  __attribute__((noinline)) static void scale_row(const Block& block, const float* scale,
                                                  float* scores) {
    for (int key = 0; key < block.groups * kGroup; key += Vec::kLanes) {
      (Vec::load(scores + key) * Vec::load(scale)).store(scores + key);
    }
  }

  static constexpr int kStep = kVecs * Vec::kLanes;
  static constexpr int kSums = QN_ISA_LEVEL >= 2 ? 8 : 4;  // Vecs of one row in registers

  /// Rows that are multiplied side by side. A single one that these would leave goes alone, with
  /// more columns.
  static int rows_together(int rows) { return rows % kRowBlock == 1 ? rows - 1 : rows; }

  template <typename U>
  static void multiply_keys(const AttentionArgs& a, const AttentionItem& item, const Block& block,
                            Scratch& s) {
    constexpr int kInterleave = sizeof(U) < 4 ? 2 : 1, kVecsOfGroup = kGroup / Vec::kLanes;
    const U* keys[kGroups];
    for (int g = 0; g < block.groups; ++g) keys[g] = reinterpret_cast<const U*>(block.keys[g]);
    const int many = rows_together(item.rows);
    for (int g = 0; g < block.groups; ++g) {
      for (int key = 0; key < kGroup; key += kStep) {
        multiply<U, kVecs>(many, s.query, a.kv.head_dim, keys[g] + key * kInterleave,
                           key_stride(a.kv), a.kv.head_dim, s.scores[0] + g * kGroup + key,
                           kScoreStride, false);
      }
    }
    if (many == item.rows) return;
    const float* const query = s.query + many * a.kv.head_dim;
    float* const scores = s.scores[0] + many * kScoreStride;
    constexpr int kTogether = kSums / kVecsOfGroup;
    int g = 0;
    for (; g + kTogether <= block.groups; g += kTogether) {
      multiply_one_row<U, kTogether, kVecsOfGroup>(query, keys + g, key_stride(a.kv), a.kv.head_dim,
                                                   scores + g * kGroup, false);
    }
    for (; g < block.groups; ++g) {
      multiply_one_row<U, 1, kVecsOfGroup>(query, keys + g, key_stride(a.kv), a.kv.head_dim,
                                           scores + g * kGroup, false);
    }
  }

  template <typename U>
  static void multiply_values(const AttentionArgs& a, const AttentionItem& item, const Block& block,
                              const Scratch& s, float* out) {
    constexpr int kInterleave = sizeof(U) < 4 ? 2 : 1, kMost = kSums * Vec::kLanes;
    const int64_t head_dim = a.kv.head_dim;
    const int many = rows_together(item.rows);
    for (int g = 0; g < block.groups; ++g) {
      const U* values = reinterpret_cast<const U*>(block.values[g]);
      const float* probs = s.scores[0] + g * kGroup;
      const bool accumulate = g > 0 || !block.starts_part;
      int64_t dim = 0;
      for (; dim + kStep <= head_dim; dim += kStep) {
        multiply<U, kVecs>(many, probs, kScoreStride, values + dim * kInterleave, head_dim, kGroup,
                           out + dim, head_dim, accumulate);
      }
      for (; dim < head_dim; dim += Vec::kLanes) {
        multiply<U, 1>(many, probs, kScoreStride, values + dim * kInterleave, head_dim, kGroup,
                       out + dim, head_dim, accumulate);
      }
      if (many == item.rows) continue;
      probs += many * kScoreStride;
      float* const row_out = out + many * head_dim;
      for (dim = 0; dim + kMost <= head_dim; dim += kMost) {
        const U* const columns = values + dim * kInterleave;
        multiply_one_row<U, 1, kSums>(probs, &columns, head_dim, kGroup, row_out + dim, accumulate);
      }
      for (; dim < head_dim; dim += Vec::kLanes) {
        const U* const columns = values + dim * kInterleave;
        multiply_one_row<U, 1, 1>(probs, &columns, head_dim, kGroup, row_out + dim, accumulate);
      }
    }
  }
};

}  // namespace
}  // namespace qn::cpu::QN_ISA
