// Weights as int8 with one scale per row: Int8 panels as they lie, 4-bit ones as
// w8 = round(weight / scale), unpacked to the same order, [step of 64 columns][side][16][64]: tiles
// for AMX and lines for vpdpbusd. Tiles multiply signed weights, vpdpbusd takes unsigned ones,
// w8 + 128. Levels avx512 and amx.
#pragma once
#include "kernels/cpu/folded_gemm.h"

namespace qn::cpu::QN_ISA {

/// Of packed 4-bit weights; matters when few tokens share a panel.
constexpr int64_t kFoldedPrefetchBytes = 3072;
constexpr int kWeightOffset = QN_ISA_LEVEL >= 4 ? 0 : 128;

/// What an int8 weight of each row is worth. With Int4 this exceeds fold_scale in rows where codes
/// that do not occur stand for weights beyond what Int4Half can multiply.
QN_INLINE __m512 scale_of(const HalfPanel& half) {
  const auto of_rows = [&](const float* rows, float factor) {
    return _mm512_mul_ps(_mm512_loadu_ps(rows + kHalfPanelRows * half.half),
                         _mm512_set1_ps(factor));
  };
  if (half.format == WeightFormat::Int8) {
    return of_rows(reinterpret_cast<const Int8PanelHeader*>(half.packed)->row_scale, 1.0f);
  }
  const PanelHeader* header = reinterpret_cast<const PanelHeader*>(half.packed);
  __m512 scale = of_rows(header->fold_scale, 1.0f);
  if (half.format == WeightFormat::Int4) {
    scale = _mm512_max_ps(scale, of_rows(header->row_scale, 255.0f / 15.87f));
    scale = _mm512_max_ps(scale, of_rows(header->row_min, 1.001f));
  }
  return scale;
}

/// 1 / scale, or 0 for a row of zeros.
QN_INLINE __m512 inverse_or_zero(__m512 scale) {
  const __mmask16 used = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_maskz_div_ps(used, _mm512_set1_ps(1.0f), scale);
}

/// A number below 2^16 in both words of its lane.
QN_INLINE __m512i in_both_words(__m512i x) {
  return _mm512_mask_blend_epi16(0xAAAAAAAAu, x, _mm512_slli_epi32(x, 16));
}

constexpr __mmask64 kOddBytes = 0xAAAAAAAAAAAAAAAAull;

/// Sixteen rows of an Int4 panel, unpacked to int8 group by group.
///
///   w8 = round(f / 16 * (code - 8) + middle),  f = round(16 * weight scale / row's int8 scale)
///
/// in words with eight fraction bits. Code 8, the middle of the range, is exact; the others are off
/// by up to 1/32 of a step of w8 for each step of code. f fits a byte, so that vpmaddubsw takes the
/// codes where they lie, in the upper half of their byte.
class Int4Half {
 public:
  Int4Half() = default;
  QN_INLINE explicit Int4Half(const HalfPanel& half) {
    const PanelHeader* header = reinterpret_cast<const PanelHeader*>(half.packed);
    const int first = half.half * static_cast<int>(kHalfPanelRows);
    const __m512 inverse = inverse_or_zero(scale_of(half));
    const auto row_factor = [&](const float* row, float unit) {
      const __m512 factor = _mm512_mul_ps(_mm512_loadu_ps(row + first), inverse);
      return in_both_words(_mm512_cvtps_epi32(_mm512_mul_ps(factor, _mm512_set1_ps(unit))));
    };
    // times_bytes divides by 256.
    eight_scales_ = row_factor(header->row_scale, 256.0f * 8 * 256);
    min_ = row_factor(header->row_min, 256.0f * 256);
    scales_ = half.packed + sizeof(PanelHeader) + first;
    codes_ = half.packed + sizeof(PanelHeader) + kScaleBytes + 256 * half.half;
  }

  /// The next 32 columns, 512 bytes.
  QN_INLINE void next(int8_t* out) {
    for (int i = 0; i < 256; i += 64) __builtin_prefetch(codes_ + kFoldedPrefetchBytes + i, 0, 3);
    const __m512i eight_steps = times_bytes(scales_, eight_scales_);
    const __m512i even = _mm512_srli_epi16(_mm512_add_epi16(eight_steps, _mm512_set1_epi16(64)), 7);
    const __m512i odd = _mm512_slli_epi16(even, 8);
    const __m512i rounding = _mm512_set1_epi16(static_cast<int16_t>(256 * kWeightOffset + 128));
    const __m512i middle = _mm512_sub_epi16(_mm512_add_epi16(eight_steps, rounding),
                                            times_bytes(scales_ + kPanelRows, min_));
    const auto fold = [&](__m512i upper_nibbles) {
      const __m512i codes = _mm512_ternarylogic_epi32(
          upper_nibbles, _mm512_set1_epi8(static_cast<char>(0xF0)),
          _mm512_set1_epi8(static_cast<char>(0x80)), (0xF0 & 0xCC) ^ 0xAA);  // 16 * (code - 8)
      const __m512i low = _mm512_add_epi16(_mm512_maddubs_epi16(even, codes), middle);
      const __m512i high = _mm512_add_epi16(_mm512_maddubs_epi16(odd, codes), middle);
      return _mm512_mask_blend_epi8(kOddBytes, _mm512_srli_epi16(low, 8), high);
    };
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i both = _mm512_loadu_si512(codes_ + 64 * i);
      _mm512_store_si512(out + 128 * i, fold(_mm512_slli_epi16(both, 4)));
      _mm512_store_si512(out + 128 * i + 64, fold(both));
    }
    scales_ += kInt4BlockBytes;
    codes_ += kInt4BlockBytes;
  }

 private:
  /// Sixteen bytes times a factor / 256, in both words.
  static QN_INLINE __m512i times_bytes(const uint8_t* bytes, __m512i factor) {
    const __m512i rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i to_upper_bytes = _mm512_add_epi32(
        _mm512_set1_epi32(0x00800080), _mm512_mullo_epi32(rows, _mm512_set1_epi32(0x01000100)));
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return _mm512_mulhi_epu16(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), to_upper_bytes),
                              factor);
  }

  __m512i eight_scales_, min_;
  const uint8_t *scales_ = nullptr, *codes_ = nullptr;
};

/// Sixteen rows of an Int4 panel as tiles.
QN_INLINE void unpack_int4(const HalfPanel& half, int64_t groups, int8_t* out) {
  Int4Half rest(half);
  for (int64_t g = 0; g < groups; ++g) rest.next(out + g / 2 * kStepBytes + g % 2 * 512);
}

/// The same of Int4Symmetric, whose scales have signs: in words with seven fraction bits, as has
/// the factor.
QN_INLINE void unpack_int4_symmetric(const HalfPanel& half, int64_t groups, int8_t* out) {
  const int first = half.half * static_cast<int>(kHalfPanelRows);
  const __m512 inverse = _mm512_mul_ps(inverse_or_zero(scale_of(half)), _mm512_set1_ps(128.0f));
  const __m512i nibble = _mm512_set1_epi16(15),
                rounding = _mm512_set1_epi32(128 * kWeightOffset + 64);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* block = half.packed + sizeof(PanelHeader) + g * kInt4BlockBytes;
    const uint8_t* codes = block + kScaleBytes + 256 * half.half;
    for (int i = 0; i < 256; i += 64) __builtin_prefetch(codes + kFoldedPrefetchBytes + i, 0, 3);
    const __m512i row_factor =
        _mm512_cvtps_epi32(_mm512_mul_ps(load_halfs(block + 2 * first).v, inverse));
    const __m512i factor = in_both_words(row_factor);
    const __m512i offset =
        in_both_words(_mm512_sub_epi32(_mm512_slli_epi32(row_factor, 3), rounding));
    // Results are modulo 2^16; those of codes that occur fit, whatever factor and offset are.
    const auto fold = [&](__m512i even, __m512i odd) {
      even = _mm512_sub_epi16(_mm512_mullo_epi16(even, factor), offset);
      odd = _mm512_sub_epi16(_mm512_mullo_epi16(odd, factor), offset);
      return _mm512_mask_blend_epi8(kOddBytes, _mm512_srli_epi16(even, 7),
                                    _mm512_slli_epi16(odd, 1));
    };
    int8_t* tile = out + g / 2 * kStepBytes + g % 2 * 512;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i v = _mm512_loadu_si512(codes + 64 * i);
      const __m512i low =
          fold(_mm512_and_si512(v, nibble), _mm512_and_si512(_mm512_srli_epi16(v, 8), nibble));
      const __m512i high =
          fold(_mm512_and_si512(_mm512_srli_epi16(v, 4), nibble), _mm512_srli_epi16(v, 12));
      _mm512_store_si512(tile + 128 * i, low);
      _mm512_store_si512(tile + 128 * i + 64, high);
    }
  }
}

/// A side whose weights have 4 bits, in tiles.
QN_INLINE void unpack_int4_tiles(const HalfPanel& half, int64_t groups, int8_t* out) {
  if (half.format == WeightFormat::Int4) {
    unpack_int4(half, groups, out);
  } else {
    unpack_int4_symmetric(half, groups, out);
  }
}

}  // namespace qn::cpu::QN_ISA
