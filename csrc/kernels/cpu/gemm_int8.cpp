// GEMM with Int8 weights, one scale per row: out = x W^T (+ bias), or with `add` out += x W^T.
//
//   y = 0
//   for each block of columns in order: y = fma(float(sum of code * x code), x scale, y)
//   result = fma(y, row_scale, bias)
//
// The sums are exact (below 2^24 in magnitude, so their floats are, too), and every element sees
// the same float operations in the same order whatever the number of tokens, at every level and in
// gemm_folded, which takes over for more of them. A panel passes kTokens tokens at a time; a few
// walk several panels at once, as in vec_panel_gemm.h.
//
//   levels: all; bytes: the weights once per pass of kTokens tokens, from the cache after the first
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec_dot.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int kTokens = QN_ISA_LEVEL >= 2 ? 8 : 4;
constexpr int64_t kPrefetchBytes = 1536;
/// Where memory_streams is 2 (measured on Zen 4), so many tokens still wait for memory and read
/// every panel's lines in ascending order, with so many panels side by side and so many tokens at a
/// time.
constexpr int64_t kMostOrderedTokens = 4;
constexpr int kOrderedPanels = QN_ISA_LEVEL == 1 ? 1 : kFewStreams;
constexpr int kOrderedTokens = QN_ISA_LEVEL == 1 ? 4 : 2;
constexpr int64_t kDwords = kInt8GroupSize / 4;

/// The results of kCount consecutive tokens of one tile with the panels first, first + step, ...
/// kAhead > 0: with prefetches so many bytes ahead, both halves of a panel by turns; 0: the lines
/// of every panel in ascending order, or, where many tokens pass a single panel, a line of both
/// halves at a time, which share what is loaded from x.
template <int kPanels, int kCount, int64_t kAhead>
QN_INLINE void gemm_block(const GemmFoldedArgs& a, int64_t first, int64_t step, int64_t token,
                          Fetch fetch = {}) {
  constexpr bool kBothHalves = QN_ISA_LEVEL >= 2 && kAhead == 0 && kPanels == 1 && kCount > 2;
  const int64_t steps = folded_cols(a.cols) / kInt8GroupSize;
  const int64_t blocks = a.x.blocks(a.cols), steps_per_block = a.x.block_cols / kInt8GroupSize;
  const int64_t panel_size = panel_bytes(WeightFormat::Int8, a.cols);
  const FoldedRow x = folded_row(a.x, a.cols, token);
  const float* x_scale = a.x.scale + token * blocks;
  const int32_t* negative_sum = a.x.negative_sum + token * blocks;
  const char* panels = static_cast<const char*>(a.weight) + first * panel_size;
  const auto codes_at = [&](int p, int64_t s, int h) {
    return reinterpret_cast<const int8_t*>(panels + p * step * panel_size) +
           sizeof(Int8PanelHeader) + s * kInt8BlockBytes + h * (kInt8BlockBytes / kHalves);
  };

  Vec y[kPanels][kHalves][kCount];
  for (auto& panel : y) {
    for (auto& half : panel) {
      for (Vec& value : half) value = Vec::zero();
    }
  }

  for (int64_t b = 0, s = 0; b < blocks; ++b) {
    GroupSum<8> sums[kPanels][kHalves][kCount];
    for (auto& panel : sums) {
      for (auto& half : panel) {
        for (int t = 0; t < kCount; ++t) half[t].start(negative_sum[t * blocks + b]);
      }
    }
    const int64_t end = s + steps_per_block < steps ? s + steps_per_block : steps;
    for (; s < end; ++s) {
      fetch.run(s);
      const int8_t* group = x.codes + s * x.step;
      const auto add = [&](int p, int h, int i) {
        const int8_t* line = codes_at(p, s, h) + 64 * i;
        if constexpr (kAhead > 0) __builtin_prefetch(line + kAhead, 0, 3);
        const Codes codes = Codes::load_signed(line);
#pragma GCC unroll 4
        for (int t = 0; t < kCount; ++t) {
          sums[p][h][t].add(codes, group + t * kFoldedTileCols + 4 * i);
        }
      };
      if constexpr (kBothHalves) {
#pragma GCC unroll 16
        for (int i = 0; i < kDwords; ++i) {
          const Codes codes[kHalves] = {Codes::load_signed(codes_at(0, s, 0) + 64 * i),
                                        Codes::load_signed(codes_at(0, s, 1) + 64 * i)};
#pragma GCC unroll 8
          for (int t = 0; t < kCount; ++t) {
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; ++h) {
              sums[0][h][t].add(codes[h], group + t * kFoldedTileCols + 4 * i);
            }
          }
        }
      } else if constexpr (kAhead > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kDwords; ++i) {
#pragma GCC unroll 4
          for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; ++h) add(p, h, i);
          }
        }
      } else {
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 16
          for (int i = 0; i < kDwords; ++i) {
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p) add(p, h, i);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
#pragma GCC unroll 4
        for (int t = 0; t < kCount; ++t) {
          y[p][h][t] = fma(sums[p][h][t].value(), Vec(x_scale[t * blocks + b]), y[p][h][t]);
        }
      }
    }
  }

  for (int p = 0; p < kPanels; ++p) {
    const float* scales =
        reinterpret_cast<const Int8PanelHeader*>(panels + p * step * panel_size)->row_scale;
    for (int h = 0; h < kHalves; ++h) {
      const int64_t row = (first + p * step) * kPanelRows + h * kHalfPanelRows;
      if (row >= a.rows) continue;
      const int n = a.rows - row < Vec::kLanes ? static_cast<int>(a.rows - row) : Vec::kLanes;
      const Vec scale = Vec::load(scales + h * kHalfPanelRows);
      const Vec bias = a.bias != nullptr ? Vec::load(a.bias + row, n) : Vec::zero();
      for (int t = 0; t < kCount; ++t) {
        Vec result = fma(y[p][h][t], scale, bias);
        float* out = a.out + (token + t) * a.out_stride + row;
        if (a.add) result = Vec::load(out, n) + result;
        result.store(out, n);
      }
    }
  }
}

/// Tokens [token, end) of one tile with the panels first, first + step, ..., kCount at a time;
/// fetch(token, how many) is the Fetch of these.
template <int kPanels, int kCount, int64_t kAhead, class FetchOf>
void gemm_tokens(const GemmFoldedArgs& a, int64_t first, int64_t step, int64_t token, int64_t end,
                 FetchOf fetch) {
  for (; token + kCount <= end; token += kCount) {
    gemm_block<kPanels, kCount, kAhead>(a, first, step, token, fetch(token, kCount));
  }
  if constexpr (kCount > 1) {
    if (token < end) gemm_tokens<kPanels, kCount / 2, kAhead>(a, first, step, token, end, fetch);
  }
}

/// Few tokens, of one tile: the panels are cut into kPanels runs that are walked side by side.
template <int kPanels, int kCount, int64_t kAhead>
void gemm_streams(const GemmFoldedArgs& a, int64_t begin, int64_t end) {
  const int64_t run = (end - begin) / kPanels;
  for (int64_t panel = begin; panel < begin + run; ++panel) {
    gemm_tokens<kPanels, kCount, kAhead>(a, panel, run, 0, a.x.tokens,
                                         [](int64_t, int64_t) { return Fetch{}; });
  }
  if constexpr (kPanels > 1) {
    gemm_streams<kPanels - 1, kCount, kAhead>(a, begin + run * kPanels, end);
  }
}

}  // namespace

void gemm_int8(const GemmFoldedArgs& a, int64_t begin, int64_t end) {
  if (a.streams == 2 && a.x.tokens <= kMostOrderedTokens) {
    return gemm_streams<kOrderedPanels, kOrderedTokens, 0>(a, begin, end);
  }
  if (a.streams == 4 && a.x.tokens < kFewTokens) {
    return gemm_streams<kStreams, 2, kPrefetchBytes>(a, begin, end);
  }
  const int64_t panel_size = panel_bytes(WeightFormat::Int8, a.cols);
  const int64_t steps = folded_cols(a.cols) / kInt8GroupSize;
  for_panel_tiles(a.x.tokens, folded_cols(a.cols), begin, end, [&](const PanelTile& tile) {
    const uint8_t* blocks =
        static_cast<const uint8_t*>(a.weight) + tile.panel * panel_size + sizeof(Int8PanelHeader);
    gemm_tokens<1, kTokens, 0>(
        a, tile.panel, 1, tile.begin, tile.end, [&](int64_t token, int64_t count) {
          return fetch_of(tile, token, count, blocks, steps, kInt8BlockBytes, kPrefetchBytes);
        });
  });
}

}  // namespace qn::cpu::QN_ISA
