// float32 rows to panels of quantised weights, with the scales that minimise the squared error.
//
//   x      [rows, cols] f32
//   out    panels of Int8, Int8Grouped, Int4Symmetric or Int4, see quant_layout.h
//   Int8: weight = row_scale * code, row_scale = max |x| / 127 of the row
//   Int8Grouped, Int4Symmetric: weight = scale * code; the codes of a trial scale give the
//   least-squares
//          scale sum(x q) / sum(q q), whose rounding to binary16 is kept if it beats plain rounding
//   Int4:  weight = scale * code - min; trial ranges, each refitted by least squares; the best
//          scale and min are rounded to 8 bits against the row's largest, and the codes chosen anew
//   levels: all; a lane is a row and a Vec a column of sixteen rows, so that no sum crosses lanes.
//          This file is compiled without contraction to FMA: every level gives the same bytes.
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int kLanes = Vec::kLanes;
constexpr float kSmallestHalf = 5.9604644775390625e-8f;  // 2^-24
constexpr float kNegligible = 7.888609052210118e-31f;    // 2^-100: a group below is taken as zero

static_assert(kLanes == kHalfPanelRows, "a Vec is a column of half a panel");

/// One group of half a panel: [column][row]; columns from `cols` on and missing rows are zero.
struct Tile {
  alignas(64) float x[kGroupSize][kLanes];
  int cols;

  QN_INLINE Vec column(int k) const { return Vec::load(x[k]); }
};

#if QN_ISA_LEVEL >= 2
/// out[c][r] = rows[r][c] for sixteen rows and columns.
QN_INLINE void transpose16(const float* rows, int64_t stride, float (*out)[kLanes]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(rows + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // a[i + j] holds columns j, j + 4, j + 8, j + 12 of four rows
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 even_top = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
    const __m512 odd_top = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 even_bottom = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 odd_bottom = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_store_ps(out[j], _mm512_shuffle_f32x4(even_top, even_bottom, 0x88));
    _mm512_store_ps(out[4 + j], _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88));
    _mm512_store_ps(out[8 + j], _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd));
    _mm512_store_ps(out[12 + j], _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd));
  }
}
#else
QN_INLINE void transpose16(const float* rows, int64_t stride, float (*out)[kLanes]) {
  for (int c = 0; c < 16; ++c) {
    for (int r = 0; r < 16; ++r) out[c][r] = rows[r * stride + c];
  }
}
#endif

/// Rows [first_row, first_row + 16) and columns [32 * group, ...) of x.
QN_INLINE void load_tile(const QuantizeArgs& a, int64_t first_row, int64_t group, Tile& tile) {
  const float* x = a.x + first_row * a.x_stride + group * kGroupSize;
  const int64_t cols_left = a.cols - group * kGroupSize, rows_left = a.rows - first_row;
  tile.cols = cols_left < kGroupSize ? static_cast<int>(cols_left) : static_cast<int>(kGroupSize);
  if (tile.cols == kGroupSize && rows_left >= kLanes) {
    transpose16(x, a.x_stride, tile.x);
    transpose16(x + 16, a.x_stride, tile.x + 16);
    return;
  }
  memset(tile.x, 0, sizeof tile.x);
  for (int r = 0; r < kLanes && r < rows_left; ++r) {
    for (int c = 0; c < tile.cols; ++c) tile.x[c][r] = x[r * a.x_stride + c];
  }
}

struct Range {
  Vec low, high;
};

/// Smallest element of each row, at most zero, and the largest. A row with NaN, infinity or an
/// element beyond the format's reach is reported and its tile zeroed.
QN_INLINE Range checked_range(const QuantizeArgs& a, int64_t first_row, Tile& tile) {
  Range range = {Vec::zero(), tile.column(0)};
  Vec nothing = Vec::zero();  // stays zero unless an element is infinite or NaN
  for (int k = 0; k < tile.cols; ++k) {
    const Vec x = tile.column(k);
    range.low = min(x, range.low);
    range.high = max(x, range.high);
    nothing = nothing + x * Vec::zero();
  }
  float excess[kLanes];
  (max(range.high, Vec::zero() - range.low) + nothing).store(excess);
  bool rejected = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (excess[lane] <= a.largest) continue;
    rejected = true;
    if (first_row + lane < *a.rejected) *a.rejected = first_row + lane;
  }
  if (rejected) {
    memset(tile.x, 0, sizeof tile.x);
    return {Vec::zero(), Vec::zero()};
  }
  return range;
}

/// To the nearest integer, ties to even; |x| < 2^22.
QN_INLINE Vec nearest(Vec x) {
  const Vec shift(12582912.0f);  // 1.5 * 2^23: the sum's last place is 1
  return (x + shift) - shift;
}

QN_INLINE Vec clamp(Vec x, float low, float high) { return min(max(x, Vec(low)), Vec(high)); }

QN_INLINE Vec reciprocal_or_zero(Vec x) {
  return select_less(Vec::zero(), abs(x), Vec(1.0f) / x, Vec::zero());
}

QN_INLINE Vec rounded_to_half(Vec x) {
  uint16_t bits[kLanes];
  store_half(bits, x);
  return load_half(bits);
}

/// The binary16 number nearest to x, but no smaller in magnitude than the smallest one.
QN_INLINE Vec half_scale(Vec x) {
  const Vec tiny = select_less(x, Vec::zero(), Vec(-kSmallestHalf), Vec(kSmallestHalf));
  return rounded_to_half(select_less(abs(x), Vec(kSmallestHalf), tiny, x));
}

/// The binary16 number next to the (finite, non-zero) half x, away from zero.
QN_INLINE Vec next_half(Vec x) {
  uint16_t bits[kLanes];
  store_half(bits, x);
  for (uint16_t& b : bits) b = static_cast<uint16_t>(b + 1);
  return load_half(bits);
}

struct SymmetricFit {
  Vec scale, error;
  Vec refit;  // least-squares scale of the codes that `scale` gives
};

/// Codes in [low, high], weight = scale * code.
QN_INLINE SymmetricFit try_symmetric(const Tile& tile, Vec scale, float low, float high) {
  const Vec inverse = reciprocal_or_zero(scale);
  Vec error = Vec::zero(), xq = Vec::zero(), qq = Vec::zero();
  for (int k = 0; k < tile.cols; ++k) {
    const Vec x = tile.column(k);
    const Vec q = nearest(clamp(x * inverse, low, high));
    const Vec residual = x - scale * q;
    error = error + residual * residual;
    xq = xq + x * q;
    qq = qq + q * q;
  }
  return {scale, error, select_less(Vec::zero(), qq, xq / qq, Vec::zero())};
}

QN_INLINE void keep_better(SymmetricFit& best, const SymmetricFit& other) {
  best.scale = select_less(other.error, best.error, other.scale, best.scale);
  best.refit = select_less(other.error, best.error, other.refit, best.refit);
  best.error = min(other.error, best.error);
}

/// Sixteen lanes of four codes each, bytes of a dword.
QN_INLINE void pack_dwords(const Vec* codes, uint32_t* dwords) {
  float c[4][kLanes];
  for (int j = 0; j < 4; ++j) codes[j].store(c[j]);
  for (int lane = 0; lane < kLanes; ++lane) {
    dwords[lane] = static_cast<uint32_t>(static_cast<int32_t>(c[0][lane])) |
                   static_cast<uint32_t>(static_cast<int32_t>(c[1][lane])) << 8 |
                   static_cast<uint32_t>(static_cast<int32_t>(c[2][lane])) << 16 |
                   static_cast<uint32_t>(static_cast<int32_t>(c[3][lane])) << 24;
  }
}

/// Writes half a block of 8-bit codes; code(k) is column k's, in [0, 255].
template <typename Code>
QN_INLINE void store_codes8(uint8_t* out, const Code& code) {
  for (int k = 0; k < kGroupSize; k += 4) {
    const Vec codes[4] = {code(k), code(k + 1), code(k + 2), code(k + 3)};
    uint32_t dwords[kLanes];
    pack_dwords(codes, dwords);
    memcpy(out + k / 4 * sizeof dwords, dwords, sizeof dwords);
  }
}

/// The same for 4-bit codes in [0, 15].
template <typename Code>
QN_INLINE void store_codes4(uint8_t* out, const Code& code) {
  for (int k = 0; k < kGroupSize; k += 8) {
    Vec pairs[4];
    for (int j = 0; j < 4; ++j) pairs[j] = code(k + j) + Vec(16.0f) * code(k + 4 + j);
    uint32_t dwords[kLanes];
    pack_dwords(pairs, dwords);
    memcpy(out + k / 8 * sizeof dwords, dwords, sizeof dwords);
  }
}

/// scale [16] half at `scales`, 512 bytes of codes at `codes`.
QN_INLINE void quantize_int8_grouped(const Tile& tile, Range range, uint8_t* scales,
                                     uint8_t* codes) {
  constexpr float kLow = -128.0f, kHigh = 127.0f;
  const Vec largest = max(range.high, Vec::zero() - range.low);
  const Vec plain = half_scale(largest * Vec(1.0f / 127.0f));
  SymmetricFit best = try_symmetric(tile, plain, kLow, kHigh);
  const Vec refit = half_scale(best.refit);
  // Where binary16 is coarse, rounding the scale down would cut the largest elements.
  keep_better(best, try_symmetric(tile, next_half(plain), kLow, kHigh));
  keep_better(best, try_symmetric(tile, refit, kLow, kHigh));
  const Vec scale = select_less(Vec::zero(), largest, best.scale, Vec::zero());
  const Vec inverse = reciprocal_or_zero(scale);
  uint16_t halves[kLanes];
  store_half(halves, scale);
  memcpy(scales, halves, sizeof halves);
  store_codes8(codes, [&](int k) {
    return nearest(clamp(tile.column(k) * inverse, kLow, kHigh)) + Vec(128.0f);
  });
}

/// scale [16] half at `scales`, 256 bytes of codes at `codes`; raises `furthest` [16] to the
/// largest |weight|.
QN_INLINE void quantize_int4_symmetric(const Tile& tile, Range range, uint8_t* scales,
                                       uint8_t* codes, float* furthest) {
  constexpr float kLow = -8.0f, kHigh = 7.0f;
  constexpr int kTrials = 9;  // each side of plain rounding
  const Vec magnitude = max(range.high, Vec::zero() - range.low);
  const Vec extreme = select_less(range.high, Vec::zero() - range.low, range.low, range.high);
  const Vec usable = select_less(magnitude, Vec(kNegligible), Vec::zero(), extreme);
  const Vec inverse_extreme = reciprocal_or_zero(usable);
  Vec best_gain = Vec::zero(), best_scale = Vec::zero();
  for (int trial = -kTrials; trial <= kTrials; ++trial) {
    const Vec inverse = inverse_extreme * Vec(kLow - 0.1f * static_cast<float>(trial));
    Vec xq = Vec::zero(), qq = Vec::zero();
    for (int k = 0; k < tile.cols; ++k) {
      const Vec x = tile.column(k);
      const Vec q = nearest(clamp(x * inverse, kLow, kHigh));
      xq = xq + x * q;
      qq = qq + q * q;
    }
    // The squared error of the least-squares scale is sum(x x) - gain.
    const Vec scale = select_less(Vec::zero(), qq, xq / qq, Vec::zero());
    const Vec gain = scale * xq;
    best_scale = select_less(best_gain, gain, scale, best_scale);
    best_gain = max(gain, best_gain);
  }
  SymmetricFit best = try_symmetric(tile, half_scale(usable * Vec(-0.125f)), kLow, kHigh);
  keep_better(best, try_symmetric(tile, half_scale(best_scale), kLow, kHigh));
  const Vec scale = select_less(Vec::zero(), abs(usable), best.scale, Vec::zero());
  const Vec inverse = reciprocal_or_zero(scale);
  uint16_t halves[kLanes];
  store_half(halves, scale);
  memcpy(scales, halves, sizeof halves);
  Vec far = Vec::load(furthest);
  store_codes4(codes, [&](int k) {
    const Vec q = nearest(clamp(tile.column(k) * inverse, kLow, kHigh));
    far = max(abs(scale * q), far);
    return q - Vec(kLow);
  });
  far.store(furthest);
}

/// weight = scale * code - min, min >= 0.
struct AffineFit {
  Vec scale, min, error;
};

/// Sums over the codes q of y = x - low, the shift that keeps the fit well conditioned.
struct CodeSums {
  Vec q, qq, yq;
};

QN_INLINE CodeSums sum_codes(const Tile& tile, Vec low, Vec inverse, Vec offset) {
  CodeSums s = {Vec::zero(), Vec::zero(), Vec::zero()};
  for (int k = 0; k < tile.cols; ++k) {
    const Vec y = tile.column(k) - low;
    const Vec q = nearest(clamp(y * inverse + offset, 0.0f, 15.0f));
    s.q = s.q + q;
    s.qq = fma(q, q, s.qq);  // small integers: exact, fused or not
    s.yq = s.yq + y * q;
  }
  return s;
}

/// The scale and shift c that minimise sum((y - scale q - c)^2) subject to c <= base = -low.
QN_INLINE AffineFit refit(const CodeSums& s, float n, Vec y, Vec yy, Vec base) {
  const Vec count(n), two(2.0f);
  const Vec determinant = count * s.qq - s.q * s.q;
  const Vec proportional = select_less(Vec::zero(), s.qq, s.yq / s.qq, Vec::zero());
  Vec scale =
      select_less(Vec::zero(), determinant, (count * s.yq - y * s.q) / determinant, proportional);
  Vec shift = select_less(Vec::zero(), determinant, (y - scale * s.q) * Vec(1.0f / n), Vec::zero());
  const Vec bounded = select_less(Vec::zero(), s.qq, (s.yq - base * s.q) / s.qq, Vec::zero());
  scale = select_less(base, shift, bounded, scale);
  shift = min(shift, base);
  const Vec error = ((yy - two * scale * s.yq) - two * shift * y) +
                    ((scale * scale * s.qq + two * scale * shift * s.q) + count * shift * shift);
  return {scale, base - shift, error};
}

QN_INLINE void keep_better(AffineFit& best, const AffineFit& other) {
  best.scale = select_less(other.error, best.error, other.scale, best.scale);
  best.min = select_less(other.error, best.error, other.min, best.min);
  best.error = min(other.error, best.error);
}

/// The best scale and min in float32: trial ranges narrowed and widened, then from the best one
/// codes and fit in turn.
QN_INLINE AffineFit search_int4(const Tile& tile, Range range) {
  constexpr int kTrials = 16, kTurns = 2;
  const Vec low = range.low;
  const Vec span = range.high - low;
  const Vec inverse_span = select_less(span, Vec(kNegligible), Vec::zero(), Vec(1.0f) / span);
  const float n = static_cast<float>(tile.cols);
  const Vec base = Vec::zero() - low;
  Vec y_sum = Vec::zero(), yy_sum = Vec::zero();
  for (int k = 0; k < tile.cols; ++k) {
    const Vec y = tile.column(k) - low;
    y_sum = y_sum + y;
    yy_sum = yy_sum + y * y;
  }
  AffineFit best = {Vec::zero(), base, Vec(__builtin_inff())};
  for (int trial = 0; trial < kTrials; ++trial) {
    const Vec inverse = inverse_span * Vec(14.0f + 0.25f * static_cast<float>(trial));
    const CodeSums sums = sum_codes(tile, low, inverse, Vec::zero());
    keep_better(best, refit(sums, n, y_sum, yy_sum, base));
  }
  for (int turn = 0; turn < kTurns; ++turn) {
    const Vec inverse = reciprocal_or_zero(best.scale);
    const CodeSums sums = sum_codes(tile, low, inverse, (best.min - base) * inverse);
    keep_better(best, refit(sums, n, y_sum, yy_sum, base));
  }
  return best;
}

/// The best 8-bit scale and min of a group, against the row's factors. `exact` is the float32 fit.
struct CodedFit {
  Vec scale, min, error;  // scale and min are integers from 0 to 255
};

QN_INLINE CodedFit code_int4(const Tile& tile, const AffineFit& exact, Vec row_scale, Vec row_min) {
  const Vec per_scale = reciprocal_or_zero(row_scale), per_min = reciprocal_or_zero(row_min);
  const Vec ideal_scale = exact.scale * per_scale;
  const Vec nearest_scale = nearest(ideal_scale);
  const Vec toward = select_less(nearest_scale, ideal_scale, Vec(1.0f), Vec(-1.0f));
  const Vec inverse_count(1.0f / static_cast<float>(tile.cols));
  CodedFit best = {Vec::zero(), Vec::zero(), Vec(__builtin_inff())};
  for (int step = 0; step < 2; ++step) {
    const Vec scale_code =
        clamp(nearest_scale + toward * Vec(static_cast<float>(step)), 0.0f, 255.0f);
    const Vec scale = row_scale * scale_code;
    const Vec inverse = reciprocal_or_zero(scale);
    Vec target = exact.min;
    for (int turn = 0; turn < 2; ++turn) {
      const Vec min_code = nearest(clamp(target * per_min, 0.0f, 255.0f));
      const Vec minimum = row_min * min_code;
      Vec error = Vec::zero(), excess = Vec::zero();
      for (int k = 0; k < tile.cols; ++k) {
        const Vec shifted = tile.column(k) + minimum;
        const Vec q = nearest(clamp(shifted * inverse, 0.0f, 15.0f));
        const Vec residual = scale * q - shifted;
        error = error + residual * residual;
        excess = excess + residual;
      }
      best.scale = select_less(error, best.error, scale_code, best.scale);
      best.min = select_less(error, best.error, min_code, best.min);
      best.error = qn::cpu::QN_ISA::min(error, best.error);
      target = minimum + excess * inverse_count;  // the best min for these codes
    }
  }
  return best;
}

QN_INLINE void store_bytes(uint8_t* out, Vec integers) {
  float lanes[kLanes];
  integers.store(lanes);
  for (int lane = 0; lane < kLanes; ++lane) {
    out[lane] = static_cast<uint8_t>(static_cast<int32_t>(lanes[lane]));
  }
}

/// Half a panel of Int4. The row factors need every group's scale and min first, so the groups are
/// read twice.
void quantize_int4_half(const QuantizeArgs& a, int64_t first_row, int64_t half, uint8_t* panel) {
  const int64_t groups = group_count(a.cols);
  float* scales = a.scratch + half;
  float* mins = scales + groups * kPanelRows;
  Vec largest_scale = Vec::zero(), largest_min = Vec::zero();
  Tile tile;
  for (int64_t group = 0; group < groups; ++group) {
    load_tile(a, first_row, group, tile);
    const Range range = checked_range(a, first_row, tile);
    const AffineFit fit = search_int4(tile, range);
    fit.scale.store(scales + group * kPanelRows);
    fit.min.store(mins + group * kPanelRows);
    largest_scale = max(fit.scale, largest_scale);
    largest_min = max(fit.min, largest_min);
  }
  const Vec row_scale = largest_scale * Vec(1.0f / 255.0f);
  const Vec row_min = largest_min * Vec(1.0f / 255.0f);
  Vec furthest = Vec::zero();
  for (int64_t group = 0; group < groups; ++group) {
    load_tile(a, first_row, group, tile);
    const AffineFit fit = {Vec::load(scales + group * kPanelRows),
                           Vec::load(mins + group * kPanelRows), Vec::zero()};
    const CodedFit coded = code_int4(tile, fit, row_scale, row_min);
    uint8_t* block = panel + sizeof(PanelHeader) + group * kInt4BlockBytes;
    store_bytes(block + half, coded.scale);
    store_bytes(block + kPanelRows + half, coded.min);
    const Vec scale = row_scale * coded.scale, minimum = row_min * coded.min;
    const Vec inverse = reciprocal_or_zero(scale);
    store_codes4(block + kScaleBytes + half / kHalfPanelRows * 256, [&](int k) {
      const Vec q = nearest(clamp((tile.column(k) + minimum) * inverse, 0.0f, 15.0f));
      if (k < tile.cols) furthest = max(abs(scale * q - minimum), furthest);
      return q;
    });
  }
  float* header = reinterpret_cast<float*>(panel);
  row_scale.store(header + half);
  row_min.store(header + kPanelRows + half);
  (furthest * Vec(1.0f / 127.0f)).store(header + 2 * kPanelRows + half);
}

/// Half a panel of Int8. The row's scale needs every group first, so the groups are read twice.
void quantize_int8_half(const QuantizeArgs& a, int64_t first_row, int64_t half, uint8_t* panel) {
  const int64_t groups = group_count(a.cols);
  constexpr int64_t kGroupBytes = kGroupSize * kHalfPanelRows;
  Vec largest = Vec::zero();
  Tile tile;
  for (int64_t group = 0; group < groups; ++group) {
    load_tile(a, first_row, group, tile);
    const Range range = checked_range(a, first_row, tile);
    largest = max(max(range.high, Vec::zero() - range.low), largest);
  }
  const Vec scale =
      select_less(largest, Vec(kNegligible), Vec::zero(), largest * Vec(1.0f / 127.0f));
  const Vec inverse = reciprocal_or_zero(scale);
  scale.store(reinterpret_cast<float*>(panel) + half);
  uint8_t* codes = panel + sizeof(Int8PanelHeader) + half / kHalfPanelRows * (kInt8BlockBytes / 2);
  for (int64_t group = 0; group < groups; ++group) {
    load_tile(a, first_row, group, tile);
    checked_range(a, first_row, tile);
    uint8_t* out = codes + group / 2 * kInt8BlockBytes + group % 2 * kGroupBytes;
    store_codes8(out, [&](int k) {
      return nearest(clamp(tile.column(k) * inverse, -127.0f, 127.0f)) + Vec(128.0f);
    });
    for (int64_t i = 0; i < kGroupBytes; ++i) out[i] ^= 128;  // code + 128 to the signed code
  }
  if (groups % 2 != 0) memset(codes + groups / 2 * kInt8BlockBytes + kGroupBytes, 0, kGroupBytes);
}

/// Half a panel of Int8Grouped or Int4Symmetric.
template <WeightFormat kFormat>
void quantize_symmetric_half(const QuantizeArgs& a, int64_t first_row, int64_t half,
                             uint8_t* panel) {
  constexpr int64_t kHalfCodes = (block_bytes(kFormat) - kScaleBytes) / 2;
  float furthest[kLanes] = {};
  Tile tile;
  uint8_t* block = panel + header_bytes(kFormat);
  for (int64_t group = 0; group < group_count(a.cols); ++group, block += block_bytes(kFormat)) {
    load_tile(a, first_row, group, tile);
    const Range range = checked_range(a, first_row, tile);
    uint8_t* scales = block + half * static_cast<int64_t>(sizeof(uint16_t));
    uint8_t* codes = block + kScaleBytes + half / kHalfPanelRows * kHalfCodes;
    if constexpr (kFormat == WeightFormat::Int8Grouped) {
      quantize_int8_grouped(tile, range, scales, codes);
    } else {
      quantize_int4_symmetric(tile, range, scales, codes, furthest);
    }
  }
  if constexpr (kFormat == WeightFormat::Int4Symmetric) {
    float* header = reinterpret_cast<float*>(panel);
    memset(header + half, 0, sizeof furthest);
    memset(header + kPanelRows + half, 0, sizeof furthest);
    (Vec::load(furthest) * Vec(1.0f / 127.0f)).store(header + 2 * kPanelRows + half);
  }
}

}  // namespace

void quantize(const QuantizeArgs& args, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    uint8_t* out = static_cast<uint8_t*>(args.out) + panel * panel_bytes(args.format, args.cols);
    for (int64_t half = 0; half < kPanelRows; half += kHalfPanelRows) {
      const int64_t first_row = panel * kPanelRows + half;
      switch (args.format) {
        case WeightFormat::Int8:
          quantize_int8_half(args, first_row, half, out);
          break;
        case WeightFormat::Int8Grouped:
          quantize_symmetric_half<WeightFormat::Int8Grouped>(args, first_row, half, out);
          break;
        case WeightFormat::Int4Symmetric:
          quantize_symmetric_half<WeightFormat::Int4Symmetric>(args, first_row, half, out);
          break;
        case WeightFormat::Int4:
          quantize_int4_half(args, first_row, half, out);
          break;
        default:
          __builtin_trap();
      }
    }
  }
}

}  // namespace qn::cpu::QN_ISA
