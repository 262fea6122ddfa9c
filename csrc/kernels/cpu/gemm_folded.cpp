// GEMM with whole columns of int32 sums (folded_gemm.h): the fast path for many tokens,
// out = x W^T (+ bias), or with `add` out += x W^T.
//
//   weights: Int8, with the same bits as gemm_int8; or a 4-bit format, whose second rounding (not
//   at the level avx2) costs about 0.3 % of the result, and the coarser scales of x as much
//   levels: avx2, avx512, amx
//   bytes per chunk of tokens: the weights once, tokens * cols once per folded_residents panels,
//   4 * tokens * rows
#include "kernels/cpu/kernels.h"
#if QN_ISA_LEVEL >= 1
#if QN_ISA_LEVEL >= 4
#include "kernels/cpu/amx_folded_gemm.h"
#else
#include "kernels/cpu/vec_folded_gemm.h"
#endif

namespace qn::cpu::QN_ISA {
namespace {

/// Results to `out`, with bias.
class FloatSink {
 public:
  explicit FloatSink(const GemmFoldedArgs& args) : a_(args) {}

  QN_INLINE void start_pairs(int64_t) {}
  QN_INLINE void start_tokens(int64_t) {}
  QN_INLINE void finish_tokens(int64_t, int64_t) {}
  QN_INLINE void prepare(int64_t panel, int64_t begin, int64_t end) {
    const float* out = a_.out + panel * kPanelRows;
    for (int64_t token = begin; token < end; ++token) {
      __builtin_prefetch(out + token * a_.out_stride, 1, 3);
      __builtin_prefetch(out + token * a_.out_stride + 16, 1, 3);
    }
  }
  QN_INLINE void start(int64_t panel, const Vec* scale) {
    out_ = a_.out + panel * kPanelRows;
    for (int h = 0; h < 2; ++h) {
      const int64_t row = panel * kPanelRows + h * kHalfPanelRows;
      const int64_t left = a_.rows - row;
      rows_[h] = left >= Vec::kLanes ? Vec::kLanes : left > 0 ? static_cast<int>(left) : 0;
      bias_[h] = a_.bias != nullptr ? Vec::load(a_.bias + row, rows_[h]) : Vec::zero();
      scale_[h] = scale[h];
    }
  }

  QN_INLINE void row(int64_t token, const Vec* y) {
    float* out = out_ + token * a_.out_stride;
    for (int h = 0; h < 2; ++h) {
      Vec result = fma(y[h], scale_[h], bias_[h]);
      if (a_.add) result = result + Vec::load(out + Vec::kLanes * h, rows_[h]);
      result.store(out + Vec::kLanes * h, rows_[h]);
    }
  }

 private:
  const GemmFoldedArgs& a_;
  float* out_ = nullptr;
  Vec scale_[2], bias_[2];
  int rows_[2];
};

}  // namespace

void gemm_folded(const GemmFoldedArgs& a, int64_t begin, int64_t end) {
  [[maybe_unused]] const FoldedScope scope;
  const int64_t panels = panel_count(a.rows), panel_size = panel_bytes(a.format, a.cols);
  const auto pair_at = [&](int64_t panel) {
    const uint8_t* packed = static_cast<const uint8_t*>(a.weight) + panel * panel_size;
    return PanelPair{{{packed, 0, a.format}, {packed, 1, a.format}}};
  };
  FloatSink sink(a);
  while (begin < end) {
    const int64_t chunk = begin / panels, panel = begin % panels;
    const int64_t count = end - begin < panels - panel ? end - begin : panels - panel;
    const int64_t first = chunk * a.chunk_tokens;
    const int64_t last = first + a.chunk_tokens < a.x.tokens ? first + a.chunk_tokens : a.x.tokens;
    multiply_pairs(a.x, a.cols, first, last, panel, panel + count,
                   static_cast<FoldedStaging*>(a.scratch), pair_at, sink);
    begin += count;
  }
}

}  // namespace qn::cpu::QN_ISA
#endif
