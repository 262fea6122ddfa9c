// Attention with vdpbf16ps, for bf16 and int8 pages. Level avx512_bf16.
#pragma once
#include "kernels/cpu/attention_bf16.h"

namespace qn::cpu::QN_ISA {
namespace {

/// Every product adds two bf16 products to a float32 sum, in ascending order: what a row gets does
/// not depend on the rows and columns that are multiplied side by side.
struct PairPath : Bf16Path {
  static void run(const AttentionArgs& a, const AttentionItem& item, Scratch& s,
                  const PartResults& results) {
    a.kv.dtype == DType::I8 ? run<true>(a, item, s, results) : run<false>(a, item, s, results);
  }

 private:
  /// What becomes of the next block while a block is multiplied.
  enum class Next { Untouched, ToL1, ToL2 };
  static constexpr int kMostRows = 8;
  static constexpr int64_t kL1Bytes = 32 << 10;
  static constexpr int kRowBytes = kDepth * static_cast<int>(sizeof(bf16));  // of queries and probs

  /// Columns side by side, as Vecs: sums enough for none to wait for another.
  static constexpr int columns_beside(int rows) { return rows <= 2 ? 8 : rows <= 4 ? 4 : 2; }

  /// Calls fn(first row, how many) for kMost rows at a time, then for those that are left.
  template <int kMost, class Fn>
  static QN_INLINE void for_rows(int begin, int end, const Fn& fn) {
    for (; begin + kMost <= end; begin += kMost) fn(begin, Count<kMost>{});
    if constexpr (kMost > 1) {
      if (begin < end) for_rows<kMost - 1>(begin, end, fn);
    }
  }

  template <Next kNext>
  static QN_INLINE void fetch(const char* line) {
    if constexpr (kNext == Next::ToL1) __builtin_prefetch(line, 0, 3);
    if constexpr (kNext == Next::ToL2) __builtin_prefetch(line, 0, 2);
  }

  /// Sixteen pairs of a page; kRead: the type in memory.
  template <DType kRead>
  static QN_INLINE __m512bh load(const char* p) {
    if constexpr (kRead == DType::I8) {
      Vec even, odd;
      load_pairs(reinterpret_cast<const int8_t*>(p), even, odd);
      return reinterpret_cast<__m512bh>(exact_pairs(even, odd));
    } else {
      return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
    }
  }

  /// c [R][16 V] (+)= a [steps][rows][32] * b; at(step, pair, v) is where sixteen pairs of b are.
  template <DType kRead, int R, int V, class At>
  static QN_INLINE void multiply(const char* a, int64_t a_step, int64_t steps, const At& at,
                                 float* c, int64_t c_stride, bool accumulate) {
    __m512 acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        acc[r][v] =
            accumulate ? _mm512_loadu_ps(c + r * c_stride + v * Vec::kLanes) : _mm512_setzero_ps();
      }
    }
    for (int64_t step = 0; step < steps; ++step, a += a_step) {
      for (int pair = 0; pair < kDepth / 2; ++pair) {
        __m512bh right[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) right[v] = load<kRead>(at(step, pair, v));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          int left;
          memcpy(&left, a + r * kRowBytes + pair * 4, sizeof left);
          const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(left));
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], both, right[v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        _mm512_storeu_ps(c + r * c_stride + v * Vec::kLanes, acc[r][v]);
      }
    }
  }

  /// scores = q k^T of one block.
  template <DType kRead, Next kNext>
  static void multiply_keys(const AttentionArgs& a, const AttentionItem& item, const Block& block,
                            const Block& next, Scratch& s) {
    constexpr int kVecBytes = kRead == DType::I8 ? 32 : 64, kGroupVecs = kGroup / Vec::kLanes;
    const int64_t depths = (a.kv.head_dim + kDepth - 1) / kDepth;
    for_rows<kMostRows>(0, item.rows, [&](int row, auto rows) {
      constexpr int kTogether = columns_beside(rows.value) / kGroupVecs;
      in_steps<kTogether>(0, block.groups, [&](int g, auto groups) {
        const char* after[groups.value];
        for (int i = 0; i < groups.value; ++i) {
          after[i] = ahead(&Block::keys, block, next, g + groups.value + i);
        }
        const auto at = [&](int64_t depth, int pair, int v) {
          const int64_t offset =
              ((depth * (kDepth / 2) + pair) * kGroupVecs + v % kGroupVecs) * kVecBytes;
          if (v * kVecBytes % 64 == 0) fetch<kNext>(after[v / kGroupVecs] + offset);
          return block.keys[g + v / kGroupVecs] + offset;
        };
        multiply<kRead, rows.value, groups.value * kGroupVecs>(
            reinterpret_cast<const char*>(s.query) + row * kRowBytes, item.rows * kRowBytes, depths,
            at, s.scores[0] + row * kScoreStride + g * kGroup, kScoreStride, false);
      });
    });
  }

  /// out (+)= p v of one block.
  template <DType kRead, Next kNext>
  static void multiply_values(const AttentionArgs& a, const AttentionItem& item, const Block& block,
                              const Block& next, const Scratch& s, float* out) {
    constexpr int kVecBytes = kRead == DType::I8 ? 32 : 64;
    const int64_t head_dim = a.kv.head_dim, pair_bytes = head_dim / Vec::kLanes * kVecBytes;
    const int vecs = static_cast<int>(head_dim / Vec::kLanes);
    for_rows<kMostRows>(0, item.rows, [&](int row, auto rows) {
      in_steps<columns_beside(rows.value)>(0, vecs, [&](int vec, auto beside) {
        const auto at = [&](int64_t group, int pair, int v) {
          const int64_t offset = pair * pair_bytes + (vec + v) * kVecBytes;
          if (v * kVecBytes % 64 == 0) {
            const int later = static_cast<int>(group) + block.groups;
            fetch<kNext>(ahead(&Block::values, block, next, later) + offset);
          }
          return block.values[group] + offset;
        };
        multiply<kRead, rows.value, beside.value>(
            reinterpret_cast<const char*>(s.probs[0]) + row * kRowBytes,
            kProbStride * static_cast<int64_t>(sizeof(bf16)), block.groups, at,
            out + row * head_dim + vec * Vec::kLanes, head_dim, !block.starts_part);
      });
    });
  }

  /// Few rows read codes of int8 pages from these and ask for the next block, beside which this one
  /// shall stay in L1; for many, a block's codes are widened once, and other items are likely to
  /// read the same pages.
  template <bool kInt8>
  static void run(const AttentionArgs& a, const AttentionItem& item, Scratch& s,
                  const PartResults& results) {
    const int64_t size = static_cast<int64_t>(dtype_size(a.kv.dtype));
    const int64_t block_bytes = 2 * kBlock * a.kv.head_dim * size;
    if (item.rows > kMostRows) {
      run<kInt8, Next::Untouched>(a, item, s, results);
    } else if (2 * block_bytes <= kL1Bytes) {
      run<kInt8, Next::ToL1>(a, item, s, results);
    } else {
      run<kInt8, Next::ToL2>(a, item, s, results);
    }
  }

  template <bool kInt8, Next kNext>
  static void run(const AttentionArgs& a, const AttentionItem& item, Scratch& s,
                  const PartResults& results) {
    constexpr bool kFew = kNext != Next::Untouched;
    constexpr DType kRead = kInt8 && kFew ? DType::I8 : DType::BF16;
    const BlockRange range = blocks_of(item, s);
    Softmax& softmax = s.softmax[0];
    Block block{}, next{};
    if (range.begin < range.end) next = locate(a, item, s, range, range.begin);
    for (int64_t index = range.begin; index < range.end; ++index) {
      block = next;
      next.groups = 0;
      if (index + 1 < range.end) next = locate(a, item, s, range, index + 1);
      if constexpr (kInt8 && !kFew) {
        widen_codes(kGroup * key_dims(a.kv), block.groups, block.keys, s.keys);
        widen_codes(kGroup * a.kv.head_dim, block.groups, block.values, s.values);
      }
      if constexpr (kInt8) load_value_scales(block, s);
      if (block.starts_part) start_part(softmax, item.rows);
      start_block(softmax, item.rows);
      multiply_keys<kRead, kNext>(a, item, block, next, s);
      if (block.groups == kGroups) {
        run_rows(Rows<true>{block, softmax, s, s.scores[0], s.probs[0], item.rows, kInt8});
      } else {
        run_rows(Rows<false>{block, softmax, s, s.scores[0], s.probs[0], item.rows, kInt8});
      }
      float* const out = results.out(block);
      if (!block.starts_part) rescale_rows(softmax, item.rows, a.kv.head_dim, out);
      multiply_values<kRead, kNext>(a, item, block, next, s, out);
      if (block.ends_part) results.finish(block, softmax);
    }
  }

  template <class AllRows>
  static QN_INLINE void run_rows(AllRows rows) {
    while (rows.done < rows.count) rows.next();
  }
};

}  // namespace
}  // namespace qn::cpu::QN_ISA
