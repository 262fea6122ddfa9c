// Attention with AMX tiles, for bf16 and int8 pages. Level amx.
#pragma once
#include "kernels/cpu/amx_tile.h"
#include "kernels/cpu/attention_bf16.h"

namespace qn::cpu::QN_ISA {
namespace {

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
    in_steps<2>(0, block.groups, [&](int g, auto groups) {
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
      in_steps<8>(0, static_cast<int>(head_dim / Vec::kLanes), [&](int tile, auto tiles) {
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
struct TilePath : Bf16Path {
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

  struct NoRows {
    QN_INLINE void next() {}
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

}  // namespace
}  // namespace qn::cpu::QN_ISA
