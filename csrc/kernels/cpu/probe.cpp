// Ceilings of this machine: loops of nothing but loads, or nothing but one kind of multiplication
// on registers.
//
//   ReadStreams   the blocks [begin, end) in 1, 2 or 4 interleaved sequential streams (which is
//                 fastest depends on how the processor reads ahead); every line is loaded once
//   FmaF32        float32 multiply-add, all levels
//   DotInt8       u8 x s8 -> i32: vpdpbusd from avx512 on, vpmaddubsw + vpmaddwd at avx2
//   DotBf16       vdpbf16ps, from avx512_bf16 on
//   TileInt8/Bf16 2 x 2 tile multiplications without reloads, level amx
// One multiply-add counts as two operations.
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"
#if QN_ISA_LEVEL >= 4
#include "kernels/cpu/amx_tile.h"
#endif

namespace qn::cpu::QN_ISA {
namespace {

template <int kStreams>
float read_streams(const char* data, int64_t begin, int64_t end) {
  constexpr int64_t kLineFloats = 16;
  constexpr int64_t kBlockFloats = kProbeBlockBytes / static_cast<int64_t>(sizeof(float));
  const int64_t per_stream = (end - begin) / kStreams * kBlockFloats;
  const float* stream = reinterpret_cast<const float*>(data) + begin * kBlockFloats;
  Vec acc[kStreams];
  for (Vec& a : acc) a = Vec::zero();
  for (int64_t i = 0; i < per_stream; i += kLineFloats) {
    for (int s = 0; s < kStreams; ++s) acc[s] = acc[s] + Vec::load(stream + s * per_stream + i);
  }
  for (int64_t i = kStreams * per_stream; i < (end - begin) * kBlockFloats; i += kLineFloats) {
    acc[0] = acc[0] + Vec::load(stream + i);
  }
  Vec total = Vec::zero();
  for (const Vec& a : acc) total = total + a;
  return sum(total);
}

/// Independent accumulators: enough to cover the latency of the multiply-add, few enough for the
/// registers.
constexpr int kAccumulators = QN_ISA_LEVEL >= 2 ? 12 : QN_ISA_LEVEL == 1 ? 6 : 2;

float fma_f32(int64_t iterations, double& operations) {
  Vec acc[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) acc[i] = Vec(static_cast<float>(i));
  const Vec factor(0.5f), term(0.25f);
  for (int64_t n = 0; n < iterations; ++n) {
    for (Vec& a : acc) a = fma(a, factor, term);
  }
  operations = 2.0 * Vec::kLanes * kAccumulators * static_cast<double>(iterations);
  Vec total = Vec::zero();
  for (const Vec& a : acc) total = total + a;
  return sum(total);
}

#if QN_ISA_LEVEL >= 2
float dot_int8(int64_t iterations, double& operations) {
  __m512i acc[12];
  for (__m512i& a : acc) a = _mm512_setzero_si512();
  __m512i codes = _mm512_set1_epi8(3), x = _mm512_set1_epi8(1);
  for (int64_t n = 0; n < iterations; ++n) {
    asm volatile("" : "+v"(codes), "+v"(x));
    for (__m512i& a : acc) a = _mm512_dpbusd_epi32(a, codes, x);
  }
  operations = 2.0 * 64 * 12 * static_cast<double>(iterations);
  __m512i total = acc[0];
  for (int i = 1; i < 12; ++i) total = _mm512_add_epi32(total, acc[i]);
  return static_cast<float>(_mm512_reduce_add_epi32(total));
}
#elif QN_ISA_LEVEL == 1
float dot_int8(int64_t iterations, double& operations) {
  __m256i acc[8];
  for (__m256i& a : acc) a = _mm256_setzero_si256();
  __m256i codes = _mm256_set1_epi8(3), x = _mm256_set1_epi8(1);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t n = 0; n < iterations; ++n) {
    for (__m256i& a : acc) {
      asm volatile("" : "+x"(codes), "+x"(x));
      a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), ones));
    }
  }
  operations = 2.0 * 32 * 8 * static_cast<double>(iterations);
  __m256i total = acc[0];
  for (int i = 1; i < 8; ++i) total = _mm256_add_epi32(total, acc[i]);
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
  return static_cast<float>(lanes[0] + lanes[7]);
}
#else
float dot_int8(int64_t iterations, double& operations) {
  uint8_t codes[64];
  int8_t x[64];
  for (int i = 0; i < 64; ++i) codes[i] = 3, x[i] = 1;
  int32_t acc[16] = {};
  for (int64_t n = 0; n < iterations; ++n) {
    asm volatile("" : : "r"(codes), "r"(x) : "memory");
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 4; ++j) acc[i] += codes[4 * i + j] * x[4 * i + j];
    }
  }
  operations = 2.0 * 64 * static_cast<double>(iterations);
  return static_cast<float>(acc[0] + acc[15]);
}
#endif

#if QN_ISA_LEVEL >= 3
float dot_bf16(int64_t iterations, double& operations) {
  Vec acc[kAccumulators];
  for (Vec& a : acc) a = Vec::zero();
  const Vec factor(0.5f), term(0.25f);
  Pairs x = Pairs::round(factor, factor), y = Pairs::round(term, term);
  for (int64_t n = 0; n < iterations; ++n) {
    asm volatile("" : "+v"(x.v), "+v"(y.v));
    for (Vec& a : acc) a = fma(x, y, a);
  }
  operations = 2.0 * Pairs::kLanes * kAccumulators * static_cast<double>(iterations);
  Vec total = Vec::zero();
  for (const Vec& a : acc) total = total + a;
  return sum(total);
}
#endif

#if QN_ISA_LEVEL >= 4
float tile_products(ProbeKind kind, int64_t iterations, double& operations) {
  alignas(64) int32_t result[16][16] = {};
  const TileScope scope;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, result, 64);
  _tile_loadd(6, result, 64);
  if (kind == ProbeKind::TileInt8) {
    for (int64_t n = 0; n < iterations; ++n) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 6);
      _tile_dpbusd(2, 4, 6);
      _tile_dpbusd(3, 4, 6);
    }
    operations = 4.0 * 2 * 16 * 16 * 64 * static_cast<double>(iterations);
  } else {
    for (int64_t n = 0; n < iterations; ++n) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 6);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 6);
    }
    operations = 4.0 * 2 * 16 * 16 * 32 * static_cast<double>(iterations);
  }
  _tile_stored(0, result, 64);
  return static_cast<float>(result[0][0]);
}
#endif

}  // namespace

void probe(const ProbeArgs& args, int64_t begin, int64_t end) {
  if (args.kind == ProbeKind::ReadStreams) {
    const char* data = static_cast<const char*>(args.data);
    args.sink[begin] = args.streams == 1   ? read_streams<1>(data, begin, end)
                       : args.streams == 2 ? read_streams<2>(data, begin, end)
                                           : read_streams<4>(data, begin, end);
    args.work[begin] += static_cast<double>((end - begin) * kProbeBlockBytes);
    return;
  }
  for (int64_t task = begin; task < end; ++task) {
    double operations = 0;
    switch (args.kind) {
      case ProbeKind::FmaF32:
        args.sink[task] = fma_f32(args.iterations, operations);
        break;
      case ProbeKind::DotInt8:
        args.sink[task] = dot_int8(args.iterations, operations);
        break;
#if QN_ISA_LEVEL >= 3
      case ProbeKind::DotBf16:
        args.sink[task] = dot_bf16(args.iterations, operations);
        break;
#endif
      default:
#if QN_ISA_LEVEL >= 4
        args.sink[task] = tile_products(args.kind, args.iterations, operations);
#endif
        break;
    }
    args.work[task] += operations;
  }
}

}  // namespace qn::cpu::QN_ISA
