// Integer dot products of quantised weights (unsigned codes) with quantised activations (int8),
// sixteen rows at a time, and the conversions around them.
//
//   Codes                   64 bytes of a block: four columns of sixteen rows; low() and high()
//                           split 4-bit codes, load_signed(p) adds 128 to signed ones
//   GroupSum<bits>          exact sum over one group: start(-sum of the activations) subtracts the
//                           codes' offset, add() takes four activations at x times the codes,
//                           value() is the int32 result as float
//   load_halfs, load_bytes  sixteen scales (binary16, uint8) as floats
//   LargestMagnitude        bits of the largest |lane| of what is added; NaN and infinity exceed
//                           all numbers
//   store_rounded(x, p)     lanes to the nearest integers (ties to even) as int8; returns them
//   CodeStore               the same for four Vecs at a time; sum() is that of all of them
//
// Ranges: |activation| <= 127, |code - 128| <= 128, codes of 4 bits <= 15. At 4 bits the eight
// products of a 16-bit lane stay below 8 * 2 * 15 * 127 = 30480; at 8 bits one pair stays below 2 *
// 128 * 127 = 32512. Nothing saturates.
#pragma once
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {

/// How gemm_int8.cpp and vec_panel_gemm.h walk panels of 2 x 16 rows: side by side where
/// memory_streams is 4, and where it is 2; where it is 4, fewer than kFewTokens walk them so.
constexpr int kHalves = 2;
constexpr int kStreams = QN_ISA_LEVEL >= 1 ? 4 : 1;
constexpr int kFewStreams = QN_ISA_LEVEL >= 1 ? 2 : 1;
constexpr int64_t kFewTokens = 8;
constexpr int64_t kActivationBytesPerPass = 1 << 20;  // what stays in L2 beside a panel

/// A tile of tokens and a panel that they meet.
struct PanelTile {
  int64_t panel, begin, end;  // the tokens, one or up to kTokenTile
  bool first_tile;            // of those that the panel meets in a row
  bool first_panel, last_panel;
};

/// Calls run(tile) for all tokens and the panels [begin, end): a panel stays in L2 while as many
/// tokens meet it as fit there, too; a token takes row_bytes.
template <class Run>
QN_INLINE void for_panel_tiles(int64_t tokens, int64_t row_bytes, int64_t begin, int64_t end,
                               Run run) {
  const int64_t fitting = kActivationBytesPerPass / (row_bytes * kTokenTile + 1);
  const int64_t together = (fitting > 1 ? fitting : 1) * kTokenTile;
  for (int64_t from = 0, to; from < tokens; from = to) {
    to = least(from + together, tokens);
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t token = from; token < to; token += kTokenTile) {
        run(PanelTile{panel, token, least(token + kTokenTile, to), token == from, panel == begin,
                      panel + 1 == end});
      }
    }
  }
}

/// Memory to be fetched into L2 while tokens pass a panel: `bytes` with each of its steps.
struct Fetch {
  const uint8_t* at;
  int64_t bytes;

  QN_INLINE void run(int64_t step) const {
    for (int64_t line = 0; line < bytes; line += 64) {
      __builtin_prefetch(at + step * bytes + line, 0, 2);
    }
  }
};

/// What `count` tokens from `token` on fetch while they pass the panel whose `steps` of step_bytes
/// begin at `here`: their share of the next panel, in whole lines, so that memory never rests. Only
/// the first panel of a range nobody has fetched: its first tokens look `ahead` bytes for
/// themselves and leave their share of the second one.
QN_INLINE Fetch fetch_of(const PanelTile& tile, int64_t token, int64_t count, const uint8_t* here,
                         int64_t steps, int64_t step_bytes, int64_t ahead) {
  if (!tile.first_tile) return {};
  if (tile.first_panel && token == tile.begin) return {here + ahead, step_bytes};
  if (tile.last_panel) return {};
  const int64_t tokens = tile.end - tile.begin;
  return {here + steps * step_bytes * (tokens + token - tile.begin) / tokens,
          (step_bytes * count / tokens + 63) / 64 * 64};
}

/// Where a token's groups are in QuantizedActivations: elements first, first + stride, ...
struct ActivationSlot {
  int64_t first, stride;
};

QN_INLINE ActivationSlot activation_slot(int64_t token, int64_t tokens, int64_t groups) {
  const int64_t block_begin = token / kTokenTile * kTokenTile;
  const int64_t left = tokens - block_begin;
  return {block_begin * groups + token - block_begin, left < kTokenTile ? left : kTokenTile};
}

/// How activations whose largest magnitude has these bits become int8: code = round(x * inverse).
/// Magnitudes below 1e-36 become zeros (127 / them would overflow); with a NaN or an infinity among
/// them (finite = false) the scale is NaN, so that every result made from them is NaN, and the
/// codes have to be zeros.
struct ActivationScale {
  float scale, inverse;
  bool finite;
};

QN_INLINE ActivationScale activation_scale(int32_t largest_bits) {
  if (largest_bits >= 0x7f800000) return {__builtin_nanf(""), 0.0f, false};
  float largest;
  memcpy(&largest, &largest_bits, sizeof largest);
  if (largest < 1e-36f) return {0.0f, 0.0f, true};
  return {largest / 127.0f, 127.0f / largest, true};
}

#if QN_ISA_LEVEL >= 2

struct Codes {
  __m512i v;
  static QN_INLINE Codes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  static QN_INLINE Codes load_signed(const int8_t* p) {
    return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
  }
  QN_INLINE Codes low() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }
  QN_INLINE Codes high() const {
    return {_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))};
  }
};

template <int kBits>
struct GroupSum {
  __m512i sum;
  QN_INLINE void start(int32_t negative_sum) {
    sum = _mm512_slli_epi32(_mm512_set1_epi32(negative_sum), kBits - 1);
  }
  QN_INLINE void add(Codes codes, const int8_t* x) {
    int32_t dword;
    memcpy(&dword, x, sizeof dword);
    sum = _mm512_dpbusd_epi32(sum, codes.v, _mm512_set1_epi32(dword));
  }
  QN_INLINE Vec value() const { return _mm512_cvtepi32_ps(sum); }
};

QN_INLINE Vec load_halfs(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
QN_INLINE Vec load_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

struct LargestMagnitude {
  __m512i largest = _mm512_setzero_si512();
  QN_INLINE void add(Vec x) {
    largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(x.v)));
  }
  QN_INLINE int32_t bits() const { return _mm512_reduce_max_epi32(largest); }
};

QN_INLINE Vec store_rounded(Vec x, int8_t* p) {
  const __m512i rounded = _mm512_cvtps_epi32(x.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(rounded));
  return _mm512_cvtepi32_ps(rounded);
}

struct CodeStore {
  __m512i total = _mm512_setzero_si512();
  QN_INLINE void store(const Vec* x, int8_t* p) {
    const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(x[0].v), _mm512_cvtps_epi32(x[1].v));
    const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(x[2].v), _mm512_cvtps_epi32(x[3].v));
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i codes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
    _mm512_storeu_si512(p, codes);
    total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), codes);
  }
  QN_INLINE int32_t sum() const { return _mm512_reduce_add_epi32(total); }
};

#elif QN_ISA_LEVEL == 1

struct Codes {
  __m256i lo, hi;
  static QN_INLINE Codes load(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static QN_INLINE Codes load_signed(const int8_t* p) {
    const Codes codes = load(reinterpret_cast<const uint8_t*>(p));
    const __m256i offset = _mm256_set1_epi8(-128);
    return {_mm256_xor_si256(codes.lo, offset), _mm256_xor_si256(codes.hi, offset)};
  }
  QN_INLINE Codes low() const {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(lo, mask), _mm256_and_si256(hi, mask)};
  }
  QN_INLINE Codes high() const {
    return Codes{_mm256_srli_epi16(lo, 4), _mm256_srli_epi16(hi, 4)}.low();
  }
};

QN_INLINE __m256i broadcast4(const int8_t* x) {
  int32_t dword;
  memcpy(&dword, x, sizeof dword);
  return _mm256_set1_epi32(dword);
}

/// Sums made so far, before the next product is. gcc would make all products first, which do not
/// fit the registers.
QN_INLINE void keep_order(__m256i& lo, __m256i& hi) { asm("" : "+x"(lo), "+x"(hi)); }

template <int kBits>
struct GroupSum;

/// Sums of pairs in 16-bit lanes, widened once per group.
template <>
struct GroupSum<4> {
  __m256i lo, hi;
  int32_t offset;
  QN_INLINE void start(int32_t negative_sum) {
    lo = hi = _mm256_setzero_si256();
    offset = 8 * negative_sum;
  }
  QN_INLINE void add(Codes codes, const int8_t* x) {
    const __m256i four = broadcast4(x);
    lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(codes.lo, four));
    hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(codes.hi, four));
    keep_order(lo, hi);
  }
  QN_INLINE Vec value() const {
    const __m256i ones = _mm256_set1_epi16(1), first = _mm256_set1_epi32(offset);
    return {_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(lo, ones), first)),
            _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(hi, ones), first))};
  }
};

/// |code - 128| times the activation with the sign of code - 128, so that no pair saturates; the
/// offset is gone too.
template <>
struct GroupSum<8> {
  __m256i lo, hi;
  QN_INLINE void start(int32_t) { lo = hi = _mm256_setzero_si256(); }
  QN_INLINE void add(Codes codes, const int8_t* x) {
    const __m256i four = broadcast4(x);
    lo = _mm256_add_epi32(lo, dot(codes.lo, four));
    hi = _mm256_add_epi32(hi, dot(codes.hi, four));
    keep_order(lo, hi);
  }
  QN_INLINE Vec value() const { return {_mm256_cvtepi32_ps(lo), _mm256_cvtepi32_ps(hi)}; }

 private:
  static QN_INLINE __m256i dot(__m256i codes, __m256i x) {
    const __m256i weight = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
};

QN_INLINE Vec load_halfs(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}
QN_INLINE Vec load_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

/// Of 32 codes.
QN_INLINE int16_t sum_of_codes(const int8_t* codes) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i words = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
  const __m256i dwords = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1));
  return static_cast<int16_t>(_mm_cvtsi128_si32(four));
}

struct LargestMagnitude {
  __m256i largest = _mm256_setzero_si256();
  QN_INLINE void add(Vec x) {
    largest = _mm256_max_epi32(largest, _mm256_max_epi32(magnitude(x.lo), magnitude(x.hi)));
  }
  QN_INLINE int32_t bits() const {
    __m128i four =
        _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1));
    return _mm_cvtsi128_si32(four);
  }

 private:
  static QN_INLINE __m256i magnitude(__m256 x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
  }
};

QN_INLINE Vec store_rounded(Vec x, int8_t* p) {
  const __m256i lo = _mm256_cvtps_epi32(x.lo), hi = _mm256_cvtps_epi32(x.hi);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xD8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  return {_mm256_cvtepi32_ps(lo), _mm256_cvtepi32_ps(hi)};
}

#else

struct Codes {
  uint8_t byte[64];
  static QN_INLINE Codes load(const uint8_t* p) {
    Codes c;
    memcpy(c.byte, p, sizeof c.byte);
    return c;
  }
  static QN_INLINE Codes load_signed(const int8_t* p) {
    Codes c;
    for (int i = 0; i < 64; ++i) c.byte[i] = static_cast<uint8_t>(p[i] + 128);
    return c;
  }
  QN_INLINE Codes low() const {
    Codes c;
    for (int i = 0; i < 64; ++i) c.byte[i] = byte[i] & 15;
    return c;
  }
  QN_INLINE Codes high() const {
    Codes c;
    for (int i = 0; i < 64; ++i) c.byte[i] = byte[i] >> 4;
    return c;
  }
};

template <int kBits>
struct GroupSum {
  int32_t lane[16];
  QN_INLINE void start(int32_t negative_sum) {
    for (int32_t& l : lane) l = negative_sum * (1 << (kBits - 1));
  }
  QN_INLINE void add(const Codes& codes, const int8_t* x) {
    for (int i = 0; i < 64; ++i) lane[i / 4] += codes.byte[i] * x[i % 4];
  }
  QN_INLINE Vec value() const {
    Vec v;
    for (int i = 0; i < 16; ++i) v.lane[i] = static_cast<float>(lane[i]);
    return v;
  }
};

QN_INLINE Vec load_halfs(const uint8_t* p) {
  Vec v;
  for (int i = 0; i < 16; ++i) {
    uint16_t half;
    memcpy(&half, p + 2 * i, sizeof half);
    v.lane[i] = math::QN_ISA::half_to_float(half);
  }
  return v;
}
QN_INLINE Vec load_bytes(const uint8_t* p) {
  Vec v;
  for (int i = 0; i < 16; ++i) v.lane[i] = static_cast<float>(p[i]);
  return v;
}

struct LargestMagnitude {
  int32_t largest = 0;
  QN_INLINE void add(Vec x) {
    for (const float& lane : x.lane) {
      int32_t magnitude;
      memcpy(&magnitude, &lane, sizeof magnitude);
      magnitude &= 0x7fffffff;
      largest = largest > magnitude ? largest : magnitude;
    }
  }
  QN_INLINE int32_t bits() const { return largest; }
};

QN_INLINE Vec store_rounded(Vec x, int8_t* p) {
  Vec rounded;
  for (int i = 0; i < 16; ++i) {
    rounded.lane[i] = nearbyintf(x.lane[i]);
    p[i] = static_cast<int8_t>(rounded.lane[i]);
  }
  return rounded;
}

#endif

#if QN_ISA_LEVEL < 2

struct CodeStore {
  Vec total = Vec::zero();  // of integers, far below 2^24: exact
  QN_INLINE void store(const Vec* x, int8_t* p) {
    for (int i = 0; i < 4; ++i) total = total + store_rounded(x[i], p + i * Vec::kLanes);
  }
  QN_INLINE int32_t sum() const { return static_cast<int32_t>(qn::cpu::QN_ISA::sum(total)); }
};

#endif

}  // namespace qn::cpu::QN_ISA
