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
// sums of uncentred codes and of mins are large and nearly cancel.) Tokens go through registers
// kTokens at a time while a panel stays in L1 or L2.
//
// Few tokens wait for memory, and what makes it fast depends on the processor (memory_streams).
// Intel's: four panels at once, a single token a cache line of each in turn, as one sequential
// stream per core does not fill the queue of outstanding cache misses; prefetched 4 KB ahead, also
// over the end of a panel into the next one. AMD's: every panel's lines in ascending order and no
// prefetches (they cost a fifth of the speed), two panels at once for a single token.
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
constexpr int kTokensPerBlock = QN_ISA_LEVEL == 1 ? 4 : 8;
constexpr int64_t kPrefetchBytes = 4032;

/// Of the weights of a group of sixteen rows whose code is 8; scale and min as stored.
QN_INLINE Vec int4_offset(Vec scale, Vec min, const PanelHeader* header, int half) {
  const Vec row_scale = Vec::load(header->row_scale + half * kHalfPanelRows);
  const Vec row_min = Vec::load(header->row_min + half * kHalfPanelRows);
  return fma(scale, Vec(8.0f) * row_scale, Vec::zero() - row_min * min);
}

/// Adds the products of 64 bytes of codes, the i-th of a half block, with one group of kTokens
/// tokens; x [kTokens][32].
template <int kBits, int kTokens>
QN_INLINE void add_codes(const uint8_t* codes, const int8_t* x, int i, GroupSum<kBits>* sums) {
  const Codes loaded = Codes::load(codes);
  if constexpr (kBits == 8) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) sums[t].add(loaded, x + t * kGroupSize + 4 * i);
  } else {
    const Codes low = loaded.low(), high = loaded.high();
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      sums[t].add(low, x + t * kGroupSize + 8 * i);
      sums[t].add(high, x + t * kGroupSize + 8 * i + 4);
    }
  }
}

/// The results of kTokens consecutive tokens of one activation block with the panels first, first +
/// step, ...; kAhead = 0: without prefetches.
template <class Format, int kPanels, int kTokens, int64_t kAhead = kPrefetchBytes>
QN_INLINE void gemm_block(const GemmQuantizedArgs& a, int64_t first, int64_t step, int64_t token) {
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

  // Half panels whose sums are in registers together; the first ones of all panels come first.
  constexpr int kParts = kPanels * kHalves;
  constexpr int kTogether = kTokens > 1 || !kManyRegisters ? 1 : kAhead > 0 ? kParts : kPanels;
  constexpr int64_t kHalfCodes = (Format::kBlock - kScaleBytes) / kHalves;
  constexpr int kVectors = kHalfCodes / 64;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = slot.first + g * slot.stride;
    const int8_t* x = a.x.codes + at * kGroupSize;
    const auto block_of = [&](int p) {
      return panels + p * step * panel_size + Format::kHeader + g * Format::kBlock;
    };
#pragma GCC unroll 8
    for (int part = 0; part < kParts; part += kTogether) {
      GroupSum<Format::kBits> sums[kTogether][kTokens];
#pragma GCC unroll 8
      for (auto& of_part : sums) {
        for (int t = 0; t < kTokens; ++t) of_part[t].start(a.x.negative_sum[at + t]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kTogether; ++j) {
          const int p = (part + j) % kPanels, h = (part + j) / kPanels;
          const uint8_t* codes = block_of(p) + kScaleBytes + h * kHalfCodes + 64 * i;
          if constexpr (kAhead > 0) __builtin_prefetch(codes + kAhead, 0, 3);
          add_codes<Format::kBits, kTokens>(codes, x, i, sums[j]);
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

/// Tokens [token, end) of one panel.
template <class Format, int kTokens>
void gemm_tokens(const GemmQuantizedArgs& a, int64_t panel, int64_t token, int64_t end) {
  for (; token + kTokens <= end; token += kTokens) {
    gemm_block<Format, 1, kTokens>(a, panel, 1, token);
  }
  if constexpr (kTokens > 1) {
    if (token < end) gemm_tokens<Format, kTokens / 2>(a, panel, token, end);
  }
}

/// Few tokens, in passes of up to four and nearly the same size: the panels are cut into kPanels
/// runs that are walked side by side.
template <class Format, int kPanels, int64_t kAhead>
void gemm_streams(const GemmQuantizedArgs& a, int64_t begin, int64_t end) {
  const int64_t run = (end - begin) / kPanels;
  for (int64_t panel = begin; panel < begin + run; ++panel) {
    int64_t passes = (a.x.tokens + 3) / 4;
    for (int64_t token = 0, count; token < a.x.tokens; token += count, --passes) {
      count = (a.x.tokens - token + passes - 1) / passes;
      if (count == 1) gemm_block<Format, kPanels, 1, kAhead>(a, panel, run, token);
      if (count == 2) gemm_block<Format, kPanels, 2, kAhead>(a, panel, run, token);
      if (count == 3) gemm_block<Format, kPanels, 3, kAhead>(a, panel, run, token);
      if (count == 4) gemm_block<Format, kPanels, 4, kAhead>(a, panel, run, token);
    }
  }
  if constexpr (kPanels > 1) {
    gemm_streams<Format, kPanels - 1, kAhead>(a, begin + run * kPanels, end);
  }
}

/// Panels [begin, end).
template <class Format>
void gemm_panels(const GemmQuantizedArgs& a, int64_t begin, int64_t end) {
  if (a.x.tokens < kFewTokens) {
    if (a.streams == 4) return gemm_streams<Format, kStreams, kPrefetchBytes>(a, begin, end);
    if (a.x.tokens == 1) return gemm_streams<Format, kFewStreams, 0>(a, begin, end);
    return gemm_streams<Format, 1, 0>(a, begin, end);
  }
  const int64_t row_bytes = group_count(a.cols) * kGroupSize;
  const int64_t fitting = kActivationBytesPerPass / (row_bytes * kTokenTile + 1);
  const int64_t pass = (fitting > 1 ? fitting : 1) * kTokenTile;
  for (int64_t pass_begin = 0; pass_begin < a.x.tokens; pass_begin += pass) {
    const int64_t left = a.x.tokens - pass_begin;
    const int64_t pass_end = pass_begin + (left < pass ? left : pass);
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t token = pass_begin; token < pass_end; token += kTokenTile) {
        const int64_t rest = pass_end - token;
        gemm_tokens<Format, kTokensPerBlock>(a, panel, token,
                                             token + (rest < kTokenTile ? rest : kTokenTile));
      }
    }
  }
}

}  // namespace qn::cpu::QN_ISA
