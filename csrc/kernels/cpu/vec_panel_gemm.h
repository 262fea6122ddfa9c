// The exact GEMM of the quantised formats, one template for all levels; gemm_int8_grouped.cpp and
// gemm_int4.cpp instantiate it.
//
//   y = 0
//   for each group in order: y = fma(float(sum of (code - offset) * x code), scale * x scale, y)
//   result = y + bias
//
//   Int4: weight = row_scale * scale * (code - 8) + offset
//   with offset = row_scale * scale * 8 - row_min * min
//   z = 0; for each group: y as above, z = fma(offset, x scale * sum of x codes, z)
//   result = fma(row_scale, y, z) + bias
//
// The sums are exact and every element sees the same float operations in the same order whatever
// the number of tokens, so its bits do not depend on the batch. (Int4 is centred like that because
// sums of uncentred codes and of mins are large and nearly cancel.) Tokens go through registers up
// to four at a time while the panel stays in L1 or L2; from avx512 on beside both of its halves,
// which share what is loaded from x.
//
// Up to four tokens wait for memory, and what makes it fast depends on the processor
// (memory_streams). Intel's: four panels at once, a single token a cache line of each in turn, as
// one sequential stream per core does not fill the queue of outstanding cache misses; prefetched
// 4 KB ahead, also over the end of a panel into the next one; up to seven tokens in the same way.
// AMD's: every panel's lines in ascending order and no prefetches (they cost a fifth of the speed),
// two panels at once for a single token. More tokens compute longer than they read, and fetch the
// next panel meanwhile (fetch_of).
#pragma once
#include "kernels/cpu/vec_dot.h"

namespace qn::cpu::QN_ISA {

struct Int8GroupedPanel {
  static constexpr int kBits = 8;
  static constexpr int64_t kHeader = 0;
  static constexpr int64_t kBlock = kInt8GroupedBlockBytes;
  static constexpr bool kHasMin = false;
};

struct Int4SymmetricPanel {
  static constexpr int kBits = 4;
  static constexpr int64_t kHeader = sizeof(PanelHeader);
  static constexpr int64_t kBlock = kInt4BlockBytes;
  static constexpr bool kHasMin = false;
};

struct Int4Panel {
  static constexpr int kBits = 4;
  static constexpr int64_t kHeader = sizeof(PanelHeader);
  static constexpr int64_t kBlock = kInt4BlockBytes;
  static constexpr bool kHasMin = true;
};

constexpr bool kManyRegisters = QN_ISA_LEVEL >= 2;
constexpr int64_t kPrefetchBytes = 4032;
constexpr int64_t kMostTokens = 4;  // at once: more results do not fit the registers of avx512

/// Of the weights of a group of sixteen rows whose code is 8; scale and min as stored.
QN_INLINE Vec int4_offset(Vec scale, Vec min, const PanelHeader* header, int half) {
  const Vec row_scale = Vec::load(header->row_scale + half * kHalfPanelRows);
  const Vec row_min = Vec::load(header->row_min + half * kHalfPanelRows);
  return fma(scale, Vec(8.0f) * row_scale, Vec::zero() - row_min * min);
}

/// Adds the products of the i-th 64 bytes of kParts half blocks with one group of kTokens tokens, x
/// [kTokens][32]; what is loaded from x serves all parts.
template <int kBits, int kParts, int kTokens>
QN_INLINE void add_codes(const Codes* codes, const int8_t* x, int i,
                         GroupSum<kBits> (*sums)[kTokens]) {
  if constexpr (kBits == 8) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
      for (int j = 0; j < kParts; ++j) sums[j][t].add(codes[j], x + t * kGroupSize + 4 * i);
    }
  } else {
    Codes low[kParts], high[kParts];
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j) {
      low[j] = codes[j].low();
      high[j] = codes[j].high();
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
      for (int j = 0; j < kParts; ++j) sums[j][t].add(low[j], x + t * kGroupSize + 8 * i);
#pragma GCC unroll 2
      for (int j = 0; j < kParts; ++j) sums[j][t].add(high[j], x + t * kGroupSize + 8 * i + 4);
    }
  }
}

/// The results of kTokens consecutive tokens of one activation block with the panels first, first +
/// step, ...; kAhead > 0: a line so far ahead is prefetched with every line.
template <class Format, int kPanels, int kTokens, int64_t kAhead>
QN_INLINE void gemm_block(const GemmQuantizedArgs& a, int64_t first, int64_t step, int64_t token,
                          Fetch fetch = {}) {
  const int64_t groups = group_count(a.cols);
  const int64_t panel_size = Format::kHeader + groups * Format::kBlock;
  const ActivationSlot slot = activation_slot(token, a.x.tokens, groups);
  const uint8_t* panels = static_cast<const uint8_t*>(a.weight) + first * panel_size;

  const auto header = [&](int p) {
    return reinterpret_cast<const PanelHeader*>(panels + p * step * panel_size);
  };

  Vec y[kPanels][kHalves][kTokens];
  Vec z[kPanels][kHalves][kTokens];
  for (int p = 0; p < kPanels; ++p) {
    for (int h = 0; h < kHalves; ++h) {
      for (int t = 0; t < kTokens; ++t) y[p][h][t] = z[p][h][t] = Vec::zero();
    }
  }

  // Half panels whose sums are in registers together: both of a single panel; else the first ones
  // of all panels come first.
  constexpr int kParts = kPanels * kHalves;
  constexpr bool kBothHalves = kManyRegisters && kPanels == 1 && kTokens > 1;
  constexpr int kTogether = kBothHalves                      ? kHalves
                            : kTokens > 1 || !kManyRegisters ? 1
                            : kAhead > 0                     ? kParts
                                                             : kPanels;
  constexpr int64_t kHalfCodes = (Format::kBlock - kScaleBytes) / kHalves;
  constexpr int kVectors = kHalfCodes / 64;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = slot.first + g * slot.stride;
    const int8_t* x = a.x.codes + at * kGroupSize;
    const auto block_of = [&](int p) {
      return panels + p * step * panel_size + Format::kHeader + g * Format::kBlock;
    };
    fetch.run(g);
#pragma GCC unroll 8
    for (int part = 0; part < kParts; part += kTogether) {
      GroupSum<Format::kBits> sums[kTogether][kTokens];
#pragma GCC unroll 8
      for (auto& of_part : sums) {
        for (int t = 0; t < kTokens; ++t) of_part[t].start(a.x.negative_sum[at + t]);
      }
      constexpr int kShared = kBothHalves ? kHalves : 1;
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kTogether; j += kShared) {
          Codes codes[kShared];
#pragma GCC unroll 2
          for (int k = 0; k < kShared; ++k) {
            const int p = (part + j + k) % kPanels, h = (part + j + k) / kPanels;
            const uint8_t* line = block_of(p) + kScaleBytes + h * kHalfCodes + 64 * i;
            if constexpr (kAhead > 0) __builtin_prefetch(line + kAhead, 0, 3);
            codes[k] = Codes::load(line);
          }
          add_codes<Format::kBits, kShared, kTokens>(codes, x, i, sums + j);
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kTogether; ++j) {
        const int p = (part + j) % kPanels, h = (part + j) / kPanels;
        const uint8_t* block = block_of(p);
        if (kAhead > 0 && h == 0) __builtin_prefetch(block + kAhead, 0, 3);
        if constexpr (Format::kHasMin) {
          const Vec scale = load_bytes(block + 16 * h);
          const Vec offset = int4_offset(scale, load_bytes(block + 32 + 16 * h), header(p), h);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            y[p][h][t] = fma(sums[j][t].value(), scale * Vec(a.x.scale[at + t]), y[p][h][t]);
            z[p][h][t] = fma(offset, Vec(a.x.scaled_sum[at + t]), z[p][h][t]);
          }
        } else {
          const Vec scale = load_halfs(block + 32 * h);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            y[p][h][t] = fma(sums[j][t].value(), scale * Vec(a.x.scale[at + t]), y[p][h][t]);
          }
        }
      }
    }
  }

  for (int p = 0; p < kPanels; ++p) {
    for (int h = 0; h < kHalves; ++h) {
      const int64_t row = (first + p * step) * kPanelRows + h * kHalfPanelRows;
      if (row >= a.rows) continue;
      const int n = a.rows - row < Vec::kLanes ? static_cast<int>(a.rows - row) : Vec::kLanes;
      for (int t = 0; t < kTokens; ++t) {
        Vec result = y[p][h][t];
        if constexpr (Format::kHasMin) {
          const Vec row_scale = Vec::load(header(p)->row_scale + h * kHalfPanelRows);
          result = fma(row_scale, result, z[p][h][t]);
        }
        if (a.bias != nullptr) result = result + Vec::load(a.bias + row, n);
        float* out = a.out + (token + t) * a.out_stride + row;
        if (a.add) result = Vec::load(out, n) + result;
        result.store(out, n);
      }
    }
  }
}

/// Calls run<how many>(first) for the tokens [begin, end), up to kMostTokens at a time and nearly
/// the same number every time.
template <class Run>
QN_INLINE void for_passes(int64_t begin, int64_t end, Run run) {
  static_assert(kMostTokens == 4, "one call for each number of tokens");
  for (int64_t passes = (end - begin + kMostTokens - 1) / kMostTokens; passes > 0; --passes) {
    const int64_t tokens = (end - begin + passes - 1) / passes;
    if (tokens == 1) run.template operator()<1>(begin);
    if (tokens == 2) run.template operator()<2>(begin);
    if (tokens == 3) run.template operator()<3>(begin);
    if (tokens == 4) run.template operator()<4>(begin);
    begin += tokens;
  }
}

/// Few tokens: the panels are cut into kPanels runs that are walked side by side.
template <class Format, int kPanels, int64_t kAhead>
void gemm_streams(const GemmQuantizedArgs& a, int64_t begin, int64_t end) {
  const int64_t run = (end - begin) / kPanels;
  for (int64_t panel = begin; panel < begin + run; ++panel) {
    for_passes(0, a.x.tokens, [&]<int kTokens>(int64_t token) {
      gemm_block<Format, kPanels, kTokens, kAhead>(a, panel, run, token);
    });
  }
  if constexpr (kPanels > 1) {
    gemm_streams<Format, kPanels - 1, kAhead>(a, begin + run * kPanels, end);
  }
}

/// More tokens. Up to kMostTokens wait for memory as a single one does, and are faster without
/// fetching.
template <class Format>
void gemm_passes(const GemmQuantizedArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = group_count(a.cols);
  const int64_t panel_size = Format::kHeader + groups * Format::kBlock;
  for_panel_tiles(a.x.tokens, groups * kGroupSize, begin, end, [&](const PanelTile& tile) {
    const uint8_t* blocks =
        static_cast<const uint8_t*>(a.weight) + tile.panel * panel_size + Format::kHeader;
    for_passes(tile.begin, tile.end, [&]<int kTokens>(int64_t token) {
      Fetch fetch{};
      if (a.x.tokens > kMostTokens) {
        fetch = fetch_of(tile, token, kTokens, blocks, groups, Format::kBlock, kPrefetchBytes);
      }
      gemm_block<Format, 1, kTokens, 0>(a, tile.panel, 1, token, fetch);
    });
  });
}

/// Panels [begin, end).
template <class Format>
void gemm_panels(const GemmQuantizedArgs& a, int64_t begin, int64_t end) {
  if (a.streams == 4 && a.x.tokens < kFewTokens) {
    return gemm_streams<Format, kStreams, kPrefetchBytes>(a, begin, end);
  }
  if (a.streams == 2 && a.x.tokens == 1) return gemm_streams<Format, kFewStreams, 0>(a, begin, end);
  gemm_passes<Format>(a, begin, end);
}

}  // namespace qn::cpu::QN_ISA
