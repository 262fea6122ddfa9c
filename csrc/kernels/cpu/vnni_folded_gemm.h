// Products of the folded GEMMs with vpdpbusd: eight tokens times sixteen plus sixteen rows in
// sixteen registers of sums. Level avx512 only.
#pragma once
#include "kernels/cpu/folded_weights.h"

namespace qn::cpu::QN_ISA {

/// A pair as unsigned weights, in tiles.
class UnpackedPair {
 public:
  QN_INLINE void unpack(const PanelPair& pair, int64_t cols, void* memory) {
    const int64_t steps = folded_cols(cols) / kFoldedTileCols, groups = group_count(cols);
    int8_t* const out = static_cast<int8_t*>(memory);
    for (int s = 0; s < 2; ++s) {
      int8_t* const tiles = out + s * kTileBytes;
      if (pair.side[s].format == WeightFormat::Int8) {
        const int8_t* const from = pair.side[s].tiles();
        for (int64_t step = 0; step < steps; ++step) {
          for (int64_t i = step * kStepBytes; i < step * kStepBytes + kTileBytes; i += 64) {
            _mm512_store_si512(tiles + i, Codes::load_signed(from + i).v);
          }
        }
      } else {
        unpack_int4_tiles(pair.side[s], groups, tiles);
        if (groups % 2 != 0) memset(tiles + (steps - 1) * kStepBytes + 512, 0, 512);
      }
      scale_[s] = scale_of(pair.side[s]);
    }
    tiles_ = out;
  }
  QN_INLINE const Vec* scale() const { return scale_; }

  /// The results of up to 32 tokens; each(step) is called on the way.
  template <class Sink, class EachStep>
  QN_INLINE void multiply(const FoldedActivations& x, int64_t cols, int64_t first, int64_t last,
                          Sink& sink, EachStep&& each) const {
    multiply_by<8>(x, cols, first, last, sink, each);
  }

 private:
  template <int kCount, class Sink, class EachStep>
  QN_INLINE void multiply_by(const FoldedActivations& x, int64_t cols, int64_t token, int64_t last,
                             Sink& sink, EachStep&& each) const {
    const int64_t first = token;
    for (; token + kCount <= last; token += kCount) {
      if (token == first) {
        multiply_tokens<kCount>(x, cols, token, sink, each);
      } else {
        multiply_tokens<kCount>(x, cols, token, sink, [](int64_t) {});
      }
    }
    if constexpr (kCount > 1) {
      if (token < last) multiply_by<kCount / 2>(x, cols, token, last, sink, [](int64_t) {});
    }
  }

  /// kCount consecutive tokens of one tile.
  template <int kCount, class Sink, class EachStep>
  QN_INLINE void multiply_tokens(const FoldedActivations& x, int64_t cols, int64_t token,
                                 Sink& sink, EachStep&& each) const {
    const int64_t steps = folded_cols(cols) / kFoldedTileCols;
    const int64_t blocks = x.blocks(cols), steps_per_block = x.block_cols / kFoldedTileCols;
    const float* const x_scale = x.scale + token * blocks;
    const int32_t* const negative_sum = x.negative_sum + token * blocks;
    FoldedRow row = folded_row(x, cols, token);
    const int8_t* tiles = tiles_;
    Vec y[kCount][2];
    for (int64_t b = 0, step = 0; b < blocks; ++b) {
      GroupSum<8> sums[kCount][2];
      for (int t = 0; t < kCount; ++t) {
        for (GroupSum<8>& sum : sums[t]) sum.start(negative_sum[t * blocks + b]);
      }
      const int64_t end = step + steps_per_block < steps ? step + steps_per_block : steps;
      for (; step < end; ++step, tiles += kStepBytes, row.codes += row.step) {
        each(step);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          Codes codes[2];
          for (int s = 0; s < 2; ++s) {
            codes[s].v = _mm512_load_si512(tiles + s * kTileBytes + 64 * i);
          }
#pragma GCC unroll 8
          for (int t = 0; t < kCount; ++t) {
            const int8_t* const four = row.codes + t * kFoldedTileCols + 4 * i;
            for (int s = 0; s < 2; ++s) sums[t][s].add(codes[s], four);
          }
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) {
        const Vec factor(x_scale[t * blocks + b]);
        for (int s = 0; s < 2; ++s) {
          const Vec sum = sums[t][s].value();
          y[t][s] = b == 0 ? sum * factor : fma(sum, factor, y[t][s]);
        }
      }
    }
    for (int t = 0; t < kCount; ++t) sink.row(token + t, y[t]);
  }

  const int8_t* tiles_;
  Vec scale_[2];
};

}  // namespace qn::cpu::QN_ISA
