// Products of the folded GEMMs with vpmaddubsw: four tokens times sixteen rows in eight registers
// of 16-bit sums. Level avx2 only.
//
//   4 bits  sums of a group's codes times x in 16 bits, as in GroupSum<4>; vpmaddwd widens them and
//           multiplies by the group's scale, an integer, so that no group needs floats:
//             y = factor * (sum of scale * (sum of code * x)) - offset factor * (sum of min * x)
//           Int4Symmetric has scale = round(its scale / the row's), min = 8 * scale
//   Int8    code + 128 = 16 * high + low, each as 4-bit codes; exact
//
// Ranges: 8 * 2 * 15 * 127 = 30480 in 16 bits; a block of 1024 columns has 32 groups, whose sums in
// 32 bits stay below 32 * 2 * 30480 * 1023 < 2^31.
#pragma once
#include "kernels/cpu/folded_gemm.h"

namespace qn::cpu::QN_ISA {

/// Sixteen rows, unpacked.
class UnpackedSide {
 public:
  /// Bytes for a step of 64 columns: the codes of two groups, or of their two halves.
  static constexpr int64_t kBytesPerStep = 4 * 512;

  QN_INLINE void unpack(const HalfPanel& half, int64_t cols, char* memory) {
    memory_ = memory;
    steps_ = folded_cols(cols) / kFoldedTileCols;
    int8_ = half.format == WeightFormat::Int8;
    if (int8_) return unpack_int8(half);
    const int64_t groups = group_count(cols);
    if (half.format == WeightFormat::Int4) {
      unpack_int4(half, groups);
    } else {
      unpack_int4_symmetric(half, groups);
    }
    if (groups % 2 != 0) {
      memset(codes(groups), 0, 512);
      memset(scales(groups), 0, 64);
    }
  }
  QN_INLINE Vec scale() const { return scale_; }

  /// Sums of the steps [begin, end), the b-th block of x, with kCount tokens of one tile.
  template <int kCount>
  QN_INLINE void multiply(const FoldedActivations& x, int64_t cols, int64_t token, int64_t b,
                          int64_t begin, int64_t end, Vec* sums) const {
    FoldedRow row = folded_row(x, cols, token);
    row.codes += begin * row.step;
    if (int8_) {
      const int64_t blocks = x.blocks(cols);
      multiply_int8<kCount>(row, x.negative_sum + token * blocks + b, blocks, begin, end, sums);
    } else {
      const int64_t stride = 2 * steps_;
      multiply_int4<kCount>(row, x.group_sums + token * stride, stride, begin, end, sums);
    }
  }

 private:
  struct Words {  // of sixteen rows
    __m256i lo, hi;
    static QN_INLINE Words load(const void* p) {
      const __m256i* const at = static_cast<const __m256i*>(p);
      return {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
    }
    QN_INLINE void store(void* p) const {
      __m256i* const at = static_cast<__m256i*>(p);
      _mm256_store_si256(at, lo);
      _mm256_store_si256(at + 1, hi);
    }
    QN_INLINE Vec value() const { return {_mm256_cvtepi32_ps(lo), _mm256_cvtepi32_ps(hi)}; }
    /// += the sums of pairs of words.
    QN_INLINE void add_pairs(const Words& a, const Words& b) {
      lo = _mm256_add_epi32(lo, _mm256_madd_epi16(a.lo, b.lo));
      hi = _mm256_add_epi32(hi, _mm256_madd_epi16(a.hi, b.hi));
    }
  };
  static QN_INLINE Words zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static QN_INLINE Words in_all(int32_t dword) {
    return {_mm256_set1_epi32(dword), _mm256_set1_epi32(dword)};
  }

  /// 16-bit sums of 32 columns of codes [8][16][4] with kCount tokens.
  template <int kCount>
  static QN_INLINE void dot_group(const char* codes, const int8_t* x, Words* words) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const Words four_codes = Words::load(codes + 64 * i);
#pragma GCC unroll 4
      for (int t = 0; t < kCount; ++t) {
        const __m256i four = broadcast4(x + t * kFoldedTileCols + 4 * i);
        const __m256i lo = _mm256_maddubs_epi16(four_codes.lo, four);
        const __m256i hi = _mm256_maddubs_epi16(four_codes.hi, four);
        words[t].lo = i == 0 ? lo : _mm256_add_epi16(words[t].lo, lo);
        words[t].hi = i == 0 ? hi : _mm256_add_epi16(words[t].hi, hi);
        keep_order(words[t].lo, words[t].hi);
      }
    }
  }

  template <int kCount>
  QN_INLINE void multiply_int4(FoldedRow x, const int16_t* group_sums, int64_t sums_stride,
                               int64_t begin, int64_t end, Vec* sums) const {
    Words total[kCount], offset[kCount];
    for (int t = 0; t < kCount; ++t) total[t] = offset[t] = zero();
    for (int64_t step = begin; step < end; ++step, x.codes += x.step) {
#pragma GCC unroll 2
      for (int g = 0; g < 2; ++g) {
        Words words[kCount];
        dot_group<kCount>(codes(2 * step + g), x.codes + g * kGroupSize, words);
        const Words scale = Words::load(scales(2 * step + g));
        for (int t = 0; t < kCount; ++t) total[t].add_pairs(words[t], scale);
      }
      const Words min = Words::load(mins(step));
      for (int t = 0; t < kCount; ++t) {
        int32_t pair;
        memcpy(&pair, group_sums + t * sums_stride + 2 * step, sizeof pair);
        offset[t].add_pairs(min, in_all(pair));
      }
    }
    for (int t = 0; t < kCount; ++t) {
      sums[t] = fma(factor_, total[t].value(), offset_factor_ * offset[t].value());
    }
  }

  template <int kCount>
  QN_INLINE void multiply_int8(FoldedRow x, const int32_t* negative_sum, int64_t blocks,
                               int64_t begin, int64_t end, Vec* sums) const {
    const Words one = in_all(0x00010001), sixteen = in_all(0x00100010);
    Words total[kCount];
    for (int t = 0; t < kCount; ++t) total[t] = in_all(128 * negative_sum[t * blocks]);
    for (int64_t step = begin; step < end; ++step, x.codes += x.step) {
#pragma GCC unroll 2
      for (int g = 0; g < 2; ++g) {
#pragma GCC unroll 2
        for (int high = 0; high < 2; ++high) {
          Words words[kCount];
          dot_group<kCount>(memory_ + step * kBytesPerStep + (2 * g + high) * 512,
                            x.codes + g * kGroupSize, words);
          for (int t = 0; t < kCount; ++t) total[t].add_pairs(words[t], high ? sixteen : one);
        }
      }
    }
    for (int t = 0; t < kCount; ++t) sums[t] = total[t].value();
  }

  // 4 bits: codes [group][8][16][4], scales [group][16][2 x the same], mins [step][16][2 groups]
  QN_INLINE char* codes(int64_t group) const { return memory_ + 512 * group; }
  QN_INLINE char* scales(int64_t group) const { return memory_ + 1024 * steps_ + 64 * group; }
  QN_INLINE char* mins(int64_t step) const { return memory_ + (1024 + 128) * steps_ + 64 * step; }

  QN_INLINE void unpack_codes(const HalfPanel& half, int64_t group) {
    const uint8_t* const from =
        half.packed + sizeof(PanelHeader) + group * kInt4BlockBytes + kScaleBytes + 256 * half.half;
    for (int i = 0; i < 4; ++i) {
      const Codes both = Codes::load(from + 64 * i);
      const Codes low = both.low(), high = both.high();
      Words{low.lo, low.hi}.store(codes(group) + 128 * i);
      Words{high.lo, high.hi}.store(codes(group) + 128 * i + 64);
    }
  }

  /// Sixteen dwords.
  static QN_INLINE Words widen(const uint8_t* bytes) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return {_mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_srli_si128(all, 8))};
  }
  /// a in the lower and b in the upper word of each dword.
  static QN_INLINE Words pairs(const Words& a, const Words& b) {
    const auto pair = [](__m256i low, __m256i high) {
      return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xAA);
    };
    return {pair(a.lo, b.lo), pair(a.hi, b.hi)};
  }

  QN_INLINE void unpack_int4(const HalfPanel& half, int64_t groups) {
    const int first = half.half * static_cast<int>(kHalfPanelRows);
    const PanelHeader* const header = reinterpret_cast<const PanelHeader*>(half.packed);
    const Vec row_scale = Vec::load(header->row_scale + first);
    const Vec row_min = Vec::load(header->row_min + first);
    scale_ = max(row_scale, row_min);
    const Vec safe = max(scale_, Vec(1e-36f));
    factor_ = row_scale / safe;
    offset_factor_ = Vec::zero() - row_min / safe;
    const uint8_t* const blocks = half.packed + sizeof(PanelHeader) + first;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* const block = blocks + g * kInt4BlockBytes;
      unpack_codes(half, g);
      const Words scale = widen(block);
      pairs(scale, scale).store(scales(g));
      if (g % 2 != 0) continue;
      const uint8_t* const next = block + kInt4BlockBytes + kPanelRows;
      pairs(widen(block + kPanelRows), g + 1 < groups ? widen(next) : zero()).store(mins(g / 2));
    }
  }

  QN_INLINE void unpack_int4_symmetric(const HalfPanel& half, int64_t groups) {
    const uint8_t* const blocks =
        half.packed + sizeof(PanelHeader) + 2 * half.half * kHalfPanelRows;
    Vec largest = Vec::zero();
    for (int64_t g = 0; g < groups; ++g) {
      largest = max(largest, abs(load_halfs(blocks + g * kInt4BlockBytes)));
    }
    scale_ = largest * Vec(1.0f / kMostScale);
    factor_ = Vec(1.0f);
    offset_factor_ = Vec(-1.0f);
    const Vec inverse = Vec(1.0f) / max(scale_, Vec(1e-36f));
    const auto scale_of = [&](int64_t g) {
      const Vec scale = load_halfs(blocks + g * kInt4BlockBytes) * inverse;
      return Words{_mm256_cvtps_epi32(scale.lo), _mm256_cvtps_epi32(scale.hi)};
    };
    const auto times_eight = [](const Words& w) {
      return Words{_mm256_slli_epi32(w.lo, 3), _mm256_slli_epi32(w.hi, 3)};
    };
    for (int64_t g = 0; g < groups; ++g) {
      unpack_codes(half, g);
      const Words scale = scale_of(g);
      pairs(scale, scale).store(scales(g));
      if (g % 2 != 0) continue;
      pairs(times_eight(scale), g + 1 < groups ? times_eight(scale_of(g + 1)) : zero())
          .store(mins(g / 2));
    }
  }

  QN_INLINE void unpack_int8(const HalfPanel& half) {
    scale_ = Vec::load(reinterpret_cast<const Int8PanelHeader*>(half.packed)->row_scale +
                       half.half * kHalfPanelRows);
    for (int64_t step = 0; step < steps_; ++step) {
      const int8_t* const from = half.tiles() + step * kStepBytes;
      for (int i = 0; i < 16; ++i) {
        const Codes bytes = Codes::load_signed(from + 64 * i);
        const Codes low = bytes.low(), high = bytes.high();
        char* const out = memory_ + step * kBytesPerStep + i / 8 * 1024 + i % 8 * 64;
        Words{low.lo, low.hi}.store(out);
        Words{high.lo, high.hi}.store(out + 512);
      }
    }
  }

  /// Of an Int4Symmetric group, as an integer.
  static constexpr float kMostScale = 1023.0f;

  char* memory_;
  int64_t steps_;
  bool int8_;
  Vec scale_, factor_, offset_factor_;
};

class UnpackedPair {
 public:
  QN_INLINE void unpack(const PanelPair& pair, int64_t cols, void* memory) {
    const int64_t steps = folded_cols(cols) / kFoldedTileCols;
    for (int s = 0; s < 2; ++s) {
      side_[s].unpack(pair.side[s], cols,
                      static_cast<char*>(memory) + s * steps * UnpackedSide::kBytesPerStep);
      scale_[s] = side_[s].scale();
    }
  }
  QN_INLINE const Vec* scale() const { return scale_; }

  /// The results of up to 32 tokens; a block of columns of one side stays in L1 while they pass.
  /// each(step) is called on the way.
  template <class Sink, class EachStep>
  QN_INLINE void multiply(const FoldedActivations& x, int64_t cols, int64_t first, int64_t last,
                          Sink& sink, EachStep&& each) const {
    const int64_t steps = folded_cols(cols) / kFoldedTileCols;
    const int64_t blocks = x.blocks(cols), steps_per_block = x.block_cols / kFoldedTileCols;
    alignas(64) float totals[2][32][Vec::kLanes];
    for (int64_t b = 0, begin = 0; b < blocks; ++b, begin += steps_per_block) {
      const int64_t end = begin + steps_per_block < steps ? begin + steps_per_block : steps;
      int64_t called = begin;
      for (int s = 0; s < 2; ++s) {
        const auto some = [&]<int kCount>(int64_t token) {
          const int64_t done = s * (last - first) + token - first;
          for (; (called - begin) * 2 * (last - first) < (end - begin) * done; ++called) {
            each(called);
          }
          Vec sums[kCount];
          side_[s].template multiply<kCount>(x, cols, token, b, begin, end, sums);
          for (int t = 0; t < kCount; ++t) {
            const Vec factor(x.scale[(token + t) * blocks + b]);
            float* const total = totals[s][token + t - first];
            const Vec y = b == 0 ? sums[t] * factor : fma(sums[t], factor, Vec::load(total));
            y.store(total);
            if (s == 0 || b + 1 < blocks) continue;
            const Vec both[2] = {Vec::load(totals[0][token + t - first]), y};
            sink.row(token + t, both);
          }
        };
        int64_t token = first;
        for (; token + 4 <= last; token += 4) some.template operator()<4>(token);
        for (; token < last; ++token) some.template operator()<1>(token);
      }
      for (; called < end; ++called) each(called);
    }
  }

 private:
  UnpackedSide side_[2];
  Vec scale_[2];
};

}  // namespace qn::cpu::QN_ISA
