// What the folded GEMMs share: products of int8 activations, one scale per token and block of
// columns, with weights whose sums stay integers over such a block; and who takes the results.
//
//   amx_folded_gemm.h   amx     weights as int8 with one scale per row (folded_weights.h), on tiles
//   vec_folded_gemm.h   avx512  the same with vpdpbusd, and the same bits
//                       avx2    4-bit codes with vpmaddubsw, scales of groups as integers
//
//   weight  sixteen rows of one panel beside sixteen of the same or another one: a pair
//   x       FoldedActivations
//   y       sum over the blocks of x scale * float(sum), given to a Sink, which multiplies by the
//           rows' scales; with Int8 the float operations are those of gemm_int8.cpp in its order
//
// A Sink takes the two vectors of sixteen sums that a token has with a pair:
//   start_pairs(end)       the pairs up to `end`, where the last ones ended, meet all tokens
//   start_tokens(token)    these pairs meet 32 tokens
//   prepare(pair, begin, end)  results of the pair with these tokens will follow
//   start(pair, scale[2])  before the first of them
//   row(token, y[2])       each token once
//   finish_tokens(begin, end)  all of these pairs have met these tokens
#pragma once
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec_dot.h"

namespace qn::cpu::QN_ISA {

constexpr int64_t kTileBytes = 1024;
/// Bytes between the steps of a half panel's tiles.
constexpr int64_t kStepBytes = 2 * kTileBytes;

/// Sixteen rows of a packed panel.
struct HalfPanel {
  const uint8_t* packed;  // the panel
  int half;
  WeightFormat format;

  /// Int8 only: [step] tiles of signed weights, kStepBytes apart.
  QN_INLINE const int8_t* tiles() const {
    return reinterpret_cast<const int8_t*>(packed) + sizeof(Int8PanelHeader) + kTileBytes * half;
  }
};

struct PanelPair {
  HalfPanel side[2];
};

}  // namespace qn::cpu::QN_ISA
