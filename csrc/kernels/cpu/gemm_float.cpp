// out = x W^T (+ bias) (+ out) for row-major float weights, used where they lie in the mapped
// checkpoint: any byte address, no repacking, no read past a row's end.
//
//   x [tokens, cols] f32; W [rows, cols] f32 or bf16; out [tokens, rows] f32
//   scalar, avx2, avx512: f32 arithmetic, bf16 weights widened in registers. One output = one Vec
//   of sixteen partial
//     sums over k, then a pairwise sum, whatever the number of tokens: blocks of rows x tokens only
//     share loads.
//   avx512_bf16, bf16 weights: the same with x rounded to bf16 (nearest even) and pairs of k.
//   amx, bf16 weights: x is rounded to bf16 (nearest even) and products accumulate in f32 tiles, 32
//   k at a time in
//     order: C^T[16 rows][16 tokens] += W[16 rows][32 k] * x^T[16 pairs of k][16 tokens][2]. k is
//     cut into blocks of at most 1152, a function of cols alone, whose sums are added in order:
//     that halves the error of long rows, and `tokens` cannot change a bit. f32 weights use the
//     avx512 kernel.
//   bytes: rows * cols * sizeof(W) once per pass over the tokens. One token is bound by that read,
//   so the next rows
//     are prefetched while the current ones are multiplied; several rows at once keep more reads in
//     flight.
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"
#include "kernels/quant_layout.h"

#if QN_ISA_LEVEL >= 4
#include "kernels/cpu/amx_tile.h"
#endif

namespace qn::cpu::QN_ISA {
#if QN_ISA_LEVEL < 4

namespace {

// Blocks of accumulators that fit the registers: 4 x 4 of 32 zmm, 2 x 2 pairs of 16 ymm.
constexpr int kRowGroup = 4;  // weight rows read side by side
constexpr int kTokenGroup = QN_ISA_LEVEL >= 2 ? 4 : 2;
constexpr int kMaxSums = QN_ISA_LEVEL >= 2 ? 16 : 4;
constexpr int64_t kTokenChunk = 48;   // tokens that pass by a row group before the next one
constexpr int64_t kBlockCols = 1024;  // of a row group, to stay in L1 while a chunk passes by

/// What one step multiplies, and x as it is read.
template <typename W>
struct Operand {
  using Lanes = Vec;
  using X = float;
  static QN_INLINE const X* x(const GemmFloatArgs& a) { return a.x; }
  static QN_INLINE int64_t x_stride(const GemmFloatArgs& a) { return a.x_stride; }
};

#if QN_ISA_LEVEL == 3
template <>
struct Operand<bf16> {
  using Lanes = Pairs;
  using X = bf16;
  static QN_INLINE X* x(const GemmFloatArgs& a) { return static_cast<X*>(a.packed_x); }
  static QN_INLINE int64_t x_stride(const GemmFloatArgs& a) { return packed_cols(a.cols); }
  static constexpr int64_t packed_cols(int64_t cols) {
    return (cols + Pairs::kLanes - 1) / Pairs::kLanes * Pairs::kLanes;
  }
};
#endif

/// Columns [begin, end) of the weight; the sums of a chunk of tokens wait in between.
struct ColumnBlock {
  int64_t begin, end;
  bool prefetch;
};

/// R rows x T tokens of out. sums [R][kTokenChunk], from the first of these tokens on.
template <typename W, int R, int T, bool kPrefetch>
QN_INLINE void dot_block(const GemmFloatArgs& a, int64_t row, int64_t token,
                         const ColumnBlock& block, Vec* sums) {
  const W* w = static_cast<const W*>(a.weight) + row * a.weight_stride;
  using Lanes = typename Operand<W>::Lanes;
  using X = typename Operand<W>::X;
  const int64_t x_stride = Operand<W>::x_stride(a);
  const X* x = Operand<W>::x(a) + token * x_stride;
  Vec acc[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      acc[r][t] = block.begin == 0 ? Vec::zero() : sums[r * kTokenChunk + t];
    }
  }
  const W* ws[R];
  const X* xs[T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) ws[r] = w + r * a.weight_stride;
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) xs[t] = x + t * x_stride;
  const int64_t ahead = R * a.weight_stride;
  const auto step = [&](int64_t k, auto load) {
    Lanes values[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) values[t] = load(xs[t] + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if constexpr (kPrefetch) __builtin_prefetch(ws[r] + ahead + k);
      const Lanes weight = load(ws[r] + k);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) acc[r][t] = fma(weight, values[t], acc[r][t]);
    }
  };
  int64_t k = block.begin;
  for (; k + Lanes::kLanes <= block.end; k += Lanes::kLanes) {
    step(k, [](const auto* p) { return Lanes::load(p); });
  }
  if (k < block.end) {
    const int left = static_cast<int>(block.end - k);
    step(k, [left](const auto* p) { return Lanes::load(p, left); });
  }
  if (block.end < a.cols) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[r * kTokenChunk + t] = acc[r][t];
    }
    return;
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    float* out = a.out + (token + t) * a.out_stride + row;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float value = sum(acc[r][t]);
      if (a.bias != nullptr) value += a.bias[row + r];
      out[r] = a.add ? out[r] + value : value;
    }
  }
}

template <typename W, int R, int T>
QN_INLINE void rows_by_tokens(const GemmFloatArgs& a, int64_t row, int64_t token,
                              const ColumnBlock& block, Vec* sums) {
  if constexpr (R > 1 && R * T > kMaxSums) {
    rows_by_tokens<W, R / 2, T>(a, row, token, block, sums);
    rows_by_tokens<W, R / 2, T>(a, row + R / 2, token, block, sums + R / 2 * kTokenChunk);
  } else if (T == 1 && block.prefetch) {
    dot_block<W, R, T, true>(a, row, token, block, sums);
  } else {
    dot_block<W, R, T, false>(a, row, token, block, sums);
  }
}

template <typename W, int R>
void row_group(const GemmFloatArgs& a, int64_t row, int64_t first_token, int64_t end_token) {
  Vec sums[kRowGroup * kTokenChunk];
  const bool few = end_token - first_token < 2 * kTokenGroup;  // all of k at once: long streams
  const int64_t width = few ? a.cols : kBlockCols;
  ColumnBlock block{0, 0, few};
  do {
    block.begin = block.end;
    block.end = least(block.begin + width, a.cols);
    int64_t token = first_token;
    for (; token + kTokenGroup <= end_token; token += kTokenGroup) {
      rows_by_tokens<W, R, kTokenGroup>(a, row, token, block, sums + (token - first_token));
    }
    for (; token < end_token; ++token) {
      rows_by_tokens<W, R, 1>(a, row, token, block, sums + (token - first_token));
    }
  } while (block.end < a.cols);
}

template <typename W>
void gemm_rows(const GemmFloatArgs& a, int64_t begin, int64_t end) {
  const int64_t end_row = least(end * kPanelRows, a.rows);
  for (int64_t token = 0; token < a.tokens; token += kTokenChunk) {
    const int64_t end_token = least(token + kTokenChunk, a.tokens);
    int64_t row = begin * kPanelRows;
    for (; row + kRowGroup <= end_row; row += kRowGroup) {
      row_group<W, kRowGroup>(a, row, token, end_token);
    }
    for (; row < end_row; ++row) row_group<W, 1>(a, row, token, end_token);
  }
}

}  // namespace

void gemm_f32(const GemmFloatArgs& args, int64_t begin, int64_t end) {
  gemm_rows<float>(args, begin, end);
}

void gemm_bf16(const GemmFloatArgs& args, int64_t begin, int64_t end) {
  gemm_rows<bf16>(args, begin, end);
}

#if QN_ISA_LEVEL == 3
GemmWorkspace gemm_bf16_workspace(int64_t tokens, int64_t cols) {
  return {tokens * Operand<bf16>::packed_cols(cols) * static_cast<int64_t>(sizeof(bf16)), 0};
}

void gemm_bf16_pack_x(const GemmFloatArgs& args, int64_t begin, int64_t end) {
  const int64_t stride = Operand<bf16>::x_stride(args);
  const int64_t last = least(end * kTokenTile, args.tokens);
  for (int64_t token = begin * kTokenTile; token < last; ++token) {
    const float* from = args.x + token * args.x_stride;
    bf16* to = Operand<bf16>::x(args) + token * stride;
    for (int64_t k = 0; k < args.cols; k += Pairs::kLanes) {
      const int64_t left = least(Pairs::kLanes, args.cols - k);
      const int low = static_cast<int>(least(left, Vec::kLanes));
      const int high = static_cast<int>(left) - low;
      Pairs::round(Vec::load(from + k, low),
                   high > 0 ? Vec::load(from + k + Vec::kLanes, high) : Vec::zero())
          .store(to + k);
    }
  }
}
#else
GemmWorkspace gemm_bf16_workspace(int64_t, int64_t) { return {0, 0}; }
#endif

#else

namespace {

constexpr int64_t kStep = 32;                     // k of one tile product
constexpr int64_t kHalfTile = 16 * kStep;         // elements of a packed weight tile
constexpr int64_t kStepElements = 2 * kHalfTile;  // of a packed panel: 32 rows
constexpr int64_t kMaxSteps = 36;                 // tile products summed in a tile: one k block
constexpr int64_t kTokenChunk = 512;              // tokens whose packed x stays in L2
constexpr int64_t kPanelGroup = 4;                // panels that pass over one k block of x
constexpr int64_t kSumsPerPair = 1024;            // 32 rows x 2 token tiles
constexpr int64_t kSumFloats = kPanelRows * kTokenChunk;  // sums of one panel
constexpr int64_t kDirectTokens = 32;  // up to here a weight is read once, straight into tiles

QN_INLINE int64_t step_count(int64_t cols) { return (cols + kStep - 1) / kStep; }

/// The blocks of k; at least one, so that no columns at all still give a sum of zero.
QN_INLINE int64_t block_count(int64_t steps) {
  return steps <= kMaxSteps ? 1 : (steps + kMaxSteps - 1) / kMaxSteps;
}
QN_INLINE int64_t block_begin(int64_t steps, int64_t block) {
  return steps * block / block_count(steps);
}

/// Packed x: [token tile][step][16 pairs of k][tokens per tile][2]. Fewer than sixteen tokens make
/// narrower tiles.
struct PackedX {
  const bf16* data;
  int64_t tile_tokens, tiles, steps;

  QN_INLINE explicit PackedX(const GemmFloatArgs& a)
      : data(static_cast<const bf16*>(a.packed_x)),
        tile_tokens(least(a.tokens, kTokenTile)),
        tiles((a.tokens + kTokenTile - 1) / kTokenTile),
        steps(step_count(a.cols)) {}
  QN_INLINE int64_t step_elements() const { return kStep * tile_tokens; }
  QN_INLINE const bf16* at(int64_t tile, int64_t step) const {
    return data + (tile * steps + step) * step_elements();
  }
};

/// Where the tiles of 32 weight rows come from: the matrix itself or a packed copy.
struct PanelSource {
  const bf16* rows;  // row 0; the second tile starts at `second`
  const bf16* second;
  int64_t row_bytes;  // between rows
  int64_t step;       // elements between steps
  int64_t steps;      // steps to read from `rows`
  const bf16* tail;   // one more step, packed, or null
};

/// What to prefetch while a block is multiplied: at each step `count` lines of a later panel, and
/// the place of one token's results.
struct Prefetch {
  const bf16* rows;
  int64_t stride;
  int64_t count;
  const float* out;
  int64_t out_stride;
  int64_t tokens;
};

// Tiles: 0 1 = rows 0..15, 2 3 = rows 16..31 of C^T; 4 = weights; 6 = x.
template <int kTokenTiles>
QN_INLINE void accumulate(const PanelSource& w, const PackedX& x, int64_t tile, int64_t first_step,
                          const Prefetch& next) {
  const bf16* x0 = x.at(tile, first_step);
  const bf16* x1 = kTokenTiles == 2 ? x.at(tile + 1, first_step) : x0;
  const int64_t x_step = x.step_elements();
  const int64_t pair_bytes = x.tile_tokens * 4;
  for (int64_t s = 0; s < w.steps; ++s) {
    for (int64_t r = 0; r < next.count; ++r) {
      __builtin_prefetch(next.rows + r * next.stride + s * kStep, 0, 2);
    }
    if (s < next.tokens) {
      __builtin_prefetch(next.out + s * next.out_stride, 1);
      __builtin_prefetch(next.out + s * next.out_stride + 16, 1);
    }
    multiply_tiles<false, 2, kTokenTiles>(w.rows + s * w.step, w.second + s * w.step, w.row_bytes,
                                          x0 + s * x_step, x1 + s * x_step, pair_bytes);
  }
  if (w.tail != nullptr) {
    multiply_tiles<false, 2, kTokenTiles>(w.tail, w.tail + kHalfTile, kStep * 2,
                                          x0 + w.steps * x_step, x1 + w.steps * x_step, pair_bytes);
  }
}

template <int kTokenTiles>
QN_INLINE void zero_tiles() {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (kTokenTiles == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
}

/// sums [2 halves of the rows][2 token tiles][16 rows][16 tokens] = (or +=) the tiles' contents.
template <int kTokenTiles>
QN_INLINE void take_sums(float* sums, bool first_block) {
  alignas(64) float fresh[kSumsPerPair];
  float* to = first_block ? sums : fresh;
  _tile_stored(0, to, 64);
  _tile_stored(2, to + 512, 64);
  if constexpr (kTokenTiles == 2) {
    _tile_stored(1, to + 256, 64);
    _tile_stored(3, to + 768, 64);
  }
  if (first_block) return;
  for (int half = 0; half < 2; ++half) {
    for (int i = half * 512; i < half * 512 + kTokenTiles * 256; i += 16) {
      (Vec::load(sums + i) + Vec::load(fresh + i)).store(sums + i);
    }
  }
}

/// out for up to 32 rows x 32 tokens; the 128 bytes of a token are written together.
QN_INLINE void write_out(const GemmFloatArgs& a, int64_t row, int64_t token, const float* sums) {
  const int n0 = static_cast<int>(least(16, a.rows - row));
  const int n1 = static_cast<int>(least(32, a.rows - row)) - n0;
  const auto write = [&a](float* out, Vec value, Vec bias, int n) {
    value = value + bias;
    if (a.add) value = Vec::load(out, n) + value;
    value.store(out, n);
  };
  const Vec bias0 = a.bias != nullptr ? Vec::load(a.bias + row, n0) : Vec::zero();
  const Vec bias1 = a.bias != nullptr && n1 > 0 ? Vec::load(a.bias + row + 16, n1) : Vec::zero();
  for (int64_t tile = 0; tile < 2; ++tile) {
    const int64_t first = token + tile * 16;
    const int64_t count = least(16, a.tokens - first);
    for (int64_t t = 0; t < count; t += 4) {
      __m512 rows0[4], rows1[4];
      transpose4(sums + tile * 256 + t, rows0);
      transpose4(sums + 512 + tile * 256 + t, rows1);
      float* out = a.out + (first + t) * a.out_stride + row;
      for (int64_t u = 0; u < least(4, count - t); ++u, out += a.out_stride) {
        write(out, rows0[u], bias0, n0);
        if (n1 > 0) write(out + 16, rows1[u], bias1, n1);
      }
    }
  }
}

/// Copies steps [first_step, first_step + steps) of up to 32 rows into tiles; rows and columns
/// beyond the matrix are 0.
void pack_panel(const GemmFloatArgs& a, int64_t row, int64_t first_step, int64_t steps,
                bf16* packed) {
  const bf16* w = static_cast<const bf16*>(a.weight) + row * a.weight_stride;
  const int64_t rows = least(kPanelRows, a.rows - row);
  for (int64_t s = 0; s < steps; ++s, packed += kStepElements) {
    const int64_t k = (first_step + s) * kStep;
    const __mmask32 mask =
        a.cols - k >= kStep ? 0xffffffffu : static_cast<__mmask32>((1u << (a.cols - k)) - 1u);
    for (int64_t r = 0; r < rows; ++r) {
      _mm512_store_si512(packed + r * kStep,
                         _mm512_maskz_loadu_epi16(mask, w + r * a.weight_stride + k));
    }
    for (int64_t r = rows; r < kPanelRows; ++r) {
      _mm512_store_si512(packed + r * kStep, _mm512_setzero_si512());
    }
  }
}

/// A full panel for at most 32 tokens: weights go from memory to tiles.
template <int kTokenTiles>
void panel_direct(const GemmFloatArgs& a, const PackedX& x, int64_t row) {
  alignas(64) float sums[kSumsPerPair] = {};
  alignas(64) bf16 tail[kStepElements];
  const bf16* w = static_cast<const bf16*>(a.weight) + row * a.weight_stride;
  const int64_t full_steps = a.cols / kStep;
  const bool has_tail = full_steps < x.steps;
  if (has_tail) pack_panel(a, row, full_steps, 1, tail);
  const int64_t blocks = block_count(x.steps);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block_begin(x.steps, block), end = block_begin(x.steps, block + 1);
    const bool with_tail = has_tail && end == x.steps;
    const bf16* rows = w + begin * kStep;
    const PanelSource source{rows,  rows + 16 * a.weight_stride,       a.weight_stride * 2,
                             kStep, end - begin - (with_tail ? 1 : 0), with_tail ? tail : nullptr};
    zero_tiles<kTokenTiles>();
    accumulate<kTokenTiles>(
        source, x, 0, begin,
        {rows + kPanelRows * a.weight_stride, a.weight_stride, kPanelRows, nullptr, 0, 0});
    take_sums<kTokenTiles>(sums, block == 0);
  }
  write_out(a, row, 0, sums);
}

/// Panels [begin, end), at most kPanelGroup, for the token tiles [first_tile, end_tile), at most
/// kTokenChunk tokens.
void panel_group(const GemmFloatArgs& a, const PackedX& x, int64_t begin, int64_t end,
                 int64_t first_tile, int64_t end_tile) {
  alignas(64) float staging[kSumsPerPair];  // instead of `sums` where k is one block
  float* sums = static_cast<float*>(a.scratch);
  bf16* packed = reinterpret_cast<bf16*>(sums + kPanelGroup * kSumFloats);
  const int64_t blocks = block_count(x.steps);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first_step = block_begin(x.steps, block);
    const int64_t steps = block_begin(x.steps, block + 1) - first_step;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t row = panel * kPanelRows;
      pack_panel(a, row, first_step, steps, packed);
      const PanelSource source{packed, packed + kHalfTile, kStep * 2, kStepElements, steps,
                               nullptr};
      float* panel_sums = sums + (panel - begin) * kSumFloats;
      // Each pair of token tiles prefetches its share of the rows of the panel that is packed next.
      const bool same_block = panel + 1 < end;
      const int64_t next_row = (same_block           ? panel + 1
                                : block + 1 < blocks ? begin
                                                     : end) *
                               kPanelRows;
      const int64_t next_step =
          same_block || block + 1 == blocks ? (same_block ? first_step : 0) : first_step + steps;
      const int64_t pairs = (end_tile - first_tile + 1) / 2;
      const int64_t share = (kPanelRows + pairs - 1) / pairs;
      for (int64_t tile = first_tile, pair = 0; tile < end_tile; tile += 2, ++pair) {
        const int64_t first_row = next_row + pair * share;
        const int64_t row_limit = least(next_row + kPanelRows, a.rows);
        const int64_t count = first_row < row_limit ? least(share, row_limit - first_row) : 0;
        const int64_t token = tile * kTokenTile;
        const Prefetch next{
            static_cast<const bf16*>(a.weight) + first_row * a.weight_stride + next_step * kStep,
            a.weight_stride,
            count,
            a.out + token * a.out_stride + row,
            a.out_stride,
            block + 1 == blocks ? least(2 * kTokenTile, a.tokens - token) : 0};
        float* pair_sums = blocks == 1 ? staging : panel_sums + pair * kSumsPerPair;
        if (tile + 1 < end_tile) {
          zero_tiles<2>();
          accumulate<2>(source, x, tile, first_step, next);
          take_sums<2>(pair_sums, block == 0);
        } else {
          zero_tiles<1>();
          accumulate<1>(source, x, tile, first_step, next);
          take_sums<1>(pair_sums, block == 0);
        }
        if (block + 1 == blocks) write_out(a, row, token, pair_sums);
      }
    }
  }
}

}  // namespace

void gemm_bf16(const GemmFloatArgs& args, int64_t begin, int64_t end) {
  const PackedX x(args);
  TileConfig config;
  const int column_bytes = static_cast<int>(x.tile_tokens * 4);
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = 16;
    config.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? 64 : column_bytes);
  }
  const TileScope scope(config);
  int64_t panel = begin;
  if (args.tokens <= kDirectTokens) {
    for (; panel < end && (panel + 1) * kPanelRows <= args.rows; ++panel) {
      if (x.tiles == 2) {
        panel_direct<2>(args, x, panel * kPanelRows);
      } else {
        panel_direct<1>(args, x, panel * kPanelRows);
      }
    }
  }
  constexpr int64_t kChunkTiles = kTokenChunk / kTokenTile;
  for (int64_t tile = 0; tile < x.tiles; tile += kChunkTiles) {
    for (int64_t group = panel; group < end; group += kPanelGroup) {
      panel_group(args, x, group, least(group + kPanelGroup, end), tile,
                  least(tile + kChunkTiles, x.tiles));
    }
  }
}

GemmWorkspace gemm_bf16_workspace(int64_t tokens, int64_t cols) {
  const int64_t tiles = (tokens + kTokenTile - 1) / kTokenTile;
  return {tiles * step_count(cols) * kStep * least(tokens, kTokenTile) * 2,
          kPanelGroup * kSumFloats * 4 + kMaxSteps * kStepElements * 2};
}

void gemm_bf16_pack_x(const GemmFloatArgs& args, int64_t begin, int64_t end) {
  const PackedX packed(args);
  const int width = static_cast<int>(packed.tile_tokens);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t tokens = least(kTokenTile, args.tokens - tile * kTokenTile);
    alignas(64) float pairs[256] = {};
    for (int64_t s = 0; s < packed.steps; ++s) {
      const int64_t k = s * kStep;
      const int64_t left = least(kStep, args.cols - k);
      const int low = static_cast<int>(least(left, 16)), high = static_cast<int>(left) - low;
      for (int64_t t = 0; t < tokens; ++t) {
        const float* from = args.x + (tile * kTokenTile + t) * args.x_stride + k;
        const Vec first = Vec::load(from, low);
        const Vec second = high > 0 ? Vec::load(from + 16, high) : Vec::zero();
        const __m512bh narrow = _mm512_cvtne2ps_pbh(second.v, first.v);
        memcpy(pairs + t * 16, &narrow, 64);
      }
      float* to = reinterpret_cast<float*>(const_cast<bf16*>(packed.at(tile, s)));
      if (width == 1) {
        memcpy(to, pairs, 64);
        continue;
      }
      __m512 columns[16];
      transpose16(pairs, columns);
      for (int pair = 0; pair < 16; ++pair) Vec(columns[pair]).store(to + pair * width, width);
    }
  }
}

#endif

}  // namespace qn::cpu::QN_ISA
