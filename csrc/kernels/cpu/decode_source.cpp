// Rows of a checkpoint's tensor to float32 (or bf16): plain floats and GGUF's blocks.
//
//   data   rows of blocks at any address; layouts as in ggml/src/ggml-common.h
//   out    [rows, cols] f32 or bf16
//   arithmetic: weight = (d * scale) * code - (dmin * min), products exact in float32, so that the
//          result equals gguf-py's `quants.dequantize` bit for bit, with or without FMA
//   levels: all; plain loops over whole sub-blocks, which the compiler vectorises at each level
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int kMaxBlock = 256;

QN_INLINE float half_at(const uint8_t* p) {
  uint16_t bits;
  memcpy(&bits, p, sizeof bits);
  return math::QN_ISA::half_to_float(bits);
}

/// The 6-bit scale and min of sub-block i of Q4_K and Q5_K, packed into 12 bytes.
QN_INLINE void scale_and_min(const uint8_t* packed, int i, float& scale, float& min) {
  const int low = i & 3;
  const uint8_t s = packed[low], m = packed[low + 4], rest = packed[low + 8];
  scale = static_cast<float>(i < 4 ? s & 63 : (rest & 15) | (s >> 2 & 48));
  min = static_cast<float>(i < 4 ? m & 63 : rest >> 4 | (m >> 2 & 48));
}

/// The fifth bits of a Q5_0 or Q5_1 block as a code each: bit 4 of element j from bit j.
QN_INLINE void fifth_bits(const uint8_t* packed, uint8_t* bits) {
  for (int byte = 0; byte < 4; ++byte) {
    const uint64_t spread = (packed[byte] * 0x0101010101010101u) & 0x8040201008040201u;
    const uint64_t word = ((spread + 0x7f7f7f7f7f7f7f7fu) & 0x8080808080808080u) >> 3;
    memcpy(bits + 8 * byte, &word, sizeof word);
  }
}

void decode_q4_0(const uint8_t* __restrict block, float* __restrict out) {
  const float d = half_at(block);
  const uint8_t* q = block + 2;
  for (int j = 0; j < 16; ++j) out[j] = d * static_cast<float>((q[j] & 15) - 8);
  for (int j = 0; j < 16; ++j) out[16 + j] = d * static_cast<float>((q[j] >> 4) - 8);
}

void decode_q4_1(const uint8_t* __restrict block, float* __restrict out) {
  const float d = half_at(block), m = half_at(block + 2);
  const uint8_t* q = block + 4;
  for (int j = 0; j < 16; ++j) out[j] = d * static_cast<float>(q[j] & 15) + m;
  for (int j = 0; j < 16; ++j) out[16 + j] = d * static_cast<float>(q[j] >> 4) + m;
}

void decode_q5_0(const uint8_t* __restrict block, float* __restrict out) {
  const float d = half_at(block);
  const uint8_t* q = block + 6;
  uint8_t high[32];
  fifth_bits(block + 2, high);
  for (int j = 0; j < 16; ++j) out[j] = d * static_cast<float>(((q[j] & 15) | high[j]) - 16);
  for (int j = 0; j < 16; ++j) {
    out[16 + j] = d * static_cast<float>((q[j] >> 4 | high[16 + j]) - 16);
  }
}

void decode_q5_1(const uint8_t* __restrict block, float* __restrict out) {
  const float d = half_at(block), m = half_at(block + 2);
  const uint8_t* q = block + 8;
  uint8_t high[32];
  fifth_bits(block + 4, high);
  for (int j = 0; j < 16; ++j) out[j] = d * static_cast<float>((q[j] & 15) | high[j]) + m;
  for (int j = 0; j < 16; ++j) out[16 + j] = d * static_cast<float>(q[j] >> 4 | high[16 + j]) + m;
}

void decode_q8_0(const uint8_t* __restrict block, float* __restrict out) {
  const float d = half_at(block);
  for (int j = 0; j < 32; ++j) out[j] = d * static_cast<float>(static_cast<int8_t>(block[2 + j]));
}

void decode_q2_k(const uint8_t* __restrict block, float* __restrict out) {
  const uint8_t *scales = block, *q = block + 16;
  const float d = half_at(block + 80), dmin = half_at(block + 82);
  for (int sub = 0; sub < 16; ++sub, out += 16) {
    const float scale = d * static_cast<float>(scales[sub] & 15);
    const float min = dmin * static_cast<float>(scales[sub] >> 4);
    const uint8_t* codes = q + 32 * (sub / 8) + 16 * (sub % 2);
    const int shift = sub % 8 / 2 * 2;
    for (int j = 0; j < 16; ++j) out[j] = scale * static_cast<float>(codes[j] >> shift & 3) - min;
  }
}

void decode_q3_k(const uint8_t* __restrict block, float* __restrict out) {
  const uint8_t *high = block, *q = block + 32, *scales = block + 96;
  const float d = half_at(block + 108);
  for (int sub = 0; sub < 16; ++sub, out += 16) {
    const int low_bits = sub < 8 ? scales[sub] & 15 : scales[sub - 8] >> 4;
    const int high_bits = scales[8 + sub % 4] >> (sub / 4 * 2) & 3;
    const float scale = d * static_cast<float>((low_bits | high_bits << 4) - 32);
    const uint8_t* codes = q + 32 * (sub / 8) + 16 * (sub % 2);
    const uint8_t* thirds = high + 16 * (sub % 2);
    const int shift = sub % 8 / 2 * 2, bit = sub / 2;
    for (int j = 0; j < 16; ++j) {
      const int code = (codes[j] >> shift & 3) + 4 * (thirds[j] >> bit & 1) - 4;
      out[j] = scale * static_cast<float>(code);
    }
  }
}

void decode_q4_k(const uint8_t* __restrict block, float* __restrict out) {
  const float d = half_at(block), dmin = half_at(block + 2);
  for (int sub = 0; sub < 8; ++sub, out += 32) {
    float scale, min;
    scale_and_min(block + 4, sub, scale, min);
    scale *= d;
    min *= dmin;
    const uint8_t* q = block + 16 + 32 * (sub / 2);
    const int shift = sub % 2 * 4;
    for (int j = 0; j < 32; ++j) out[j] = scale * static_cast<float>(q[j] >> shift & 15) - min;
  }
}

void decode_q5_k(const uint8_t* __restrict block, float* __restrict out) {
  const float d = half_at(block), dmin = half_at(block + 2);
  const uint8_t* high = block + 16;
  for (int sub = 0; sub < 8; ++sub, out += 32) {
    float scale, min;
    scale_and_min(block + 4, sub, scale, min);
    scale *= d;
    min *= dmin;
    const uint8_t* q = block + 48 + 32 * (sub / 2);
    const int shift = sub % 2 * 4;
    for (int j = 0; j < 32; ++j) {
      out[j] = scale * static_cast<float>((q[j] >> shift & 15) | (high[j] >> sub & 1) << 4) - min;
    }
  }
}

void decode_q6_k(const uint8_t* __restrict block, float* __restrict out) {
  const uint8_t *low = block, *high = block + 128, *scales = block + 192;
  const float d = half_at(block + 208);
  for (int sub = 0; sub < 16; ++sub, out += 16) {
    const float scale = d * static_cast<float>(static_cast<int8_t>(scales[sub]));
    const int half = sub / 8, part = sub % 8 / 2, column = 16 * (sub % 2);
    const uint8_t* l = low + 64 * half + 32 * (part % 2) + column;
    const uint8_t* h = high + 32 * half + column;
    const int low_shift = part / 2 * 4, high_shift = part * 2;
    for (int j = 0; j < 16; ++j) {
      const int code = (l[j] >> low_shift & 15) | (h[j] >> high_shift & 3) << 4;
      out[j] = scale * static_cast<float>(code - 32);
    }
  }
}

QN_INLINE void store_block(const float* block, int n, float* out) {
  memcpy(out, block, static_cast<size_t>(n) * sizeof(float));
}

QN_INLINE void store_block(const float* block, int n, bf16* out) {
  for (int i = 0; i < n; i += Vec::kLanes) Vec::load(block + i).store(out + i);
}

template <void (*decode)(const uint8_t*, float*), int kElements, int kBytes, typename T>
void decode_blocks(const uint8_t* data, int64_t cols, T* out) {
  alignas(64) float block[kMaxBlock];
  for (int64_t i = 0; i < cols; i += kElements, data += kBytes) {
    decode(data, block);
    store_block(block, kElements, out + i);
  }
}

QN_INLINE Vec load_floats(const float* p) { return Vec::load(p); }
QN_INLINE Vec load_floats(const bf16* p) { return Vec::load(p); }
QN_INLINE Vec load_floats(const uint16_t* p) { return load_half(p); }

/// Plain floats of storage type S (float, bf16, or uint16_t for binary16), maybe misaligned.
template <typename S, typename T>
void decode_floats(const uint8_t* data, int64_t cols, T* out) {
  for (int64_t i = 0; i < cols; i += Vec::kLanes) {
    const int64_t left = cols - i;
    const int n = left < Vec::kLanes ? static_cast<int>(left) : Vec::kLanes;
    S lanes[Vec::kLanes] = {};
    memcpy(lanes, data + i * static_cast<int64_t>(sizeof(S)), static_cast<size_t>(n) * sizeof(S));
    if (n == Vec::kLanes) {
      load_floats(lanes).store(out + i);
    } else {
      load_floats(lanes).store(out + i, n);
    }
  }
}

template <typename T>
void decode_row(SourceType source, const uint8_t* data, int64_t cols, T* out) {
  constexpr bool kNarrow = sizeof(T) == sizeof(bf16);
  switch (source) {
    case SourceType::F32:
      if (!kNarrow) break;
      return decode_floats<float>(data, cols, out);
    case SourceType::F16:
      return decode_floats<uint16_t>(data, cols, out);
    case SourceType::BF16:
      if (kNarrow) break;
      return decode_floats<bf16>(data, cols, out);
    case SourceType::Q4_0:
      return decode_blocks<decode_q4_0, 32, 18>(data, cols, out);
    case SourceType::Q4_1:
      return decode_blocks<decode_q4_1, 32, 20>(data, cols, out);
    case SourceType::Q5_0:
      return decode_blocks<decode_q5_0, 32, 22>(data, cols, out);
    case SourceType::Q5_1:
      return decode_blocks<decode_q5_1, 32, 24>(data, cols, out);
    case SourceType::Q8_0:
      return decode_blocks<decode_q8_0, 32, 34>(data, cols, out);
    case SourceType::Q2_K:
      return decode_blocks<decode_q2_k, 256, 84>(data, cols, out);
    case SourceType::Q3_K:
      return decode_blocks<decode_q3_k, 256, 110>(data, cols, out);
    case SourceType::Q4_K:
      return decode_blocks<decode_q4_k, 256, 144>(data, cols, out);
    case SourceType::Q5_K:
      return decode_blocks<decode_q5_k, 256, 176>(data, cols, out);
    case SourceType::Q6_K:
      return decode_blocks<decode_q6_k, 256, 210>(data, cols, out);
  }
  memcpy(out, data, static_cast<size_t>(cols) * sizeof(T));
}

template <typename T>
void decode_rows(const DecodeSourceArgs& a, int64_t begin, int64_t end) {
  const int64_t row_bytes = source_row_bytes(a.source, a.cols);
  for (int64_t row = begin; row < end; ++row) {
    decode_row(a.source, static_cast<const uint8_t*>(a.data) + row * row_bytes, a.cols,
               static_cast<T*>(a.out) + row * a.out_stride);
  }
}

}  // namespace

void decode_source(const DecodeSourceArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::BF16) {
    decode_rows<bf16>(args, begin, end);
  } else {
    decode_rows<float>(args, begin, end);
  }
}

}  // namespace qn::cpu::QN_ISA
