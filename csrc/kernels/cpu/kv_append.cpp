// Appends keys and values to pages of the KV cache (layouts: KvGeometry in args.h).
//
//   k, v [tokens, num_kv_heads, head_dim] f32; bf16 and int8 pages round to nearest even
//   levels: all, through Vec for the conversion; the rest moves dwords or words
//   bytes per token and kv head: reads 8 * head_dim, writes 2 * head_dim * sizeof(T), plus once a
//   page its zeroing
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"
#include "kernels/cpu/vec_dot.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int64_t kGroup = 32;  // keys of a page that lie together

/// Where a key's first pair of dims goes; the next one is kGroup pairs further.
char* key_pairs(const KvGeometry& kv, char* head, int64_t slot, int64_t pair_bytes) {
  const int64_t key_bytes = kv.value_offset / kv.page_tokens;
  return head + slot / kGroup * kGroup * key_bytes + slot % kGroup * pair_bytes;
}

void append(const KvAppendItem& item, const KvGeometry& kv, char* head, const float* k,
            int64_t k_stride, const float* v, int64_t v_stride, const float*, float*) {
  float* keys = reinterpret_cast<float*>(head) + item.slot;
  float* values = reinterpret_cast<float*>(head + kv.value_offset) + item.slot * kv.head_dim;
  for (int64_t dim = 0; dim < kv.head_dim; ++dim) {
    for (int64_t i = 0; i < item.count; ++i) keys[dim * kv.page_tokens + i] = k[i * k_stride + dim];
  }
  for (int64_t i = 0; i < item.count; ++i) {
    memcpy(values + i * kv.head_dim, v + i * v_stride,
           static_cast<size_t>(kv.head_dim) * sizeof(float));
  }
}

void append(const KvAppendItem& item, const KvGeometry& kv, char* head, const float* k,
            int64_t k_stride, const float* v, int64_t v_stride, const float*, bf16*) {
  constexpr int64_t kTokens = 16;
  bf16 narrow[kTokens][kAttentionMaxHeadDim];
  const auto convert = [&](const float* source, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t dim = 0; dim < kv.head_dim; dim += Vec::kLanes) {
        Vec::load(source + i * stride + dim).store(narrow[i] + dim);
      }
    }
  };
  bf16* values = reinterpret_cast<bf16*>(head + kv.value_offset);
  for (int64_t begin = 0; begin < item.count; begin += kTokens) {
    const int64_t left = item.count - begin, count = left < kTokens ? left : kTokens;
    convert(k + begin * k_stride, k_stride, count);
    char* pairs[kTokens];
    for (int64_t i = 0; i < count; ++i) pairs[i] = key_pairs(kv, head, item.slot + begin + i, 4);
    for (int64_t dim = 0; dim < kv.head_dim; dim += 2) {
      for (int64_t i = 0; i < count; ++i) memcpy(pairs[i] + dim * kGroup * 2, narrow[i] + dim, 4);
    }
    convert(v + begin * v_stride, v_stride, count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = item.slot + begin + i;
      bf16* row = values + slot / 2 * kv.head_dim * 2 + slot % 2;
      for (int64_t dim = 0; dim < kv.head_dim; ++dim) row[2 * dim] = narrow[i][dim];
    }
  }
}

/// Writes round(x / scale) and returns scale = max|x| / 127: 0 for a row of zeros, NaN for one that
/// has NaN or infinity.
float quantize_row(const float* x, int64_t head_dim, int8_t* codes) {
  Vec top = Vec::zero(), not_finite = Vec::zero();
  for (int64_t dim = 0; dim < head_dim; dim += Vec::kLanes) {
    const Vec part = Vec::load(x + dim);
    top = max(top, abs(part));
    not_finite = fma(part, Vec::zero(), not_finite);
  }
  const float scale = max(top) / 127.0f + sum(not_finite);
  // Probabilities, which are multiplied with the scales of values, must not become denormals.
  const bool negligible = !(scale >= 0x1p-80f);
  const Vec inverse(negligible ? 0.0f : 1.0f / scale);
  for (int64_t dim = 0; dim < head_dim; dim += Vec::kLanes) {
    const Vec part = negligible ? Vec::zero() : Vec::load(x + dim);
    store_rounded(part * inverse, codes + dim);
  }
  return negligible && scale == scale ? 0.0f : scale;
}

void append(const KvAppendItem& item, const KvGeometry& kv, char* head, const float* k,
            int64_t k_stride, const float* v, int64_t v_stride, const float* key_scale, int8_t*) {
  int8_t codes[kAttentionMaxHeadDim];
  float divided[kAttentionMaxHeadDim];
  int8_t* const values = reinterpret_cast<int8_t*>(head + kv.value_offset);
  float* const scales = reinterpret_cast<float*>(head + kv.scale_offset);
  for (int64_t i = 0; i < item.count; ++i) {
    const int64_t slot = item.slot + i;
    const float* key = k + i * k_stride;
    if (key_scale != nullptr) {
      for (int64_t dim = 0; dim < kv.head_dim; dim += Vec::kLanes) {
        (Vec::load(key + dim) / Vec::load(key_scale + dim)).store(divided + dim);
      }
      key = divided;
    }
    scales[slot] = quantize_row(key, kv.head_dim, codes);
    char* const pairs = key_pairs(kv, head, slot, 2);
    for (int64_t dim = 0; dim < kv.head_dim; dim += 2) {
      memcpy(pairs + dim * kGroup, codes + dim, 2);
    }
    scales[kv.page_tokens + slot] = quantize_row(v + i * v_stride, kv.head_dim, codes);
    int8_t* row = values + slot / 2 * kv.head_dim * 2 + slot % 2;
    for (int64_t dim = 0; dim < kv.head_dim; ++dim) row[2 * dim] = codes[dim];
  }
}

template <typename T>
void append_items(const KvAppendArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const KvAppendItem& item = a.items[i / a.kv.num_kv_heads];
    const int64_t kv_head = i % a.kv.num_kv_heads;
    char* head = item.page + kv_head * a.kv.head_bytes;
    if (item.slot == 0) memset(head, 0, static_cast<size_t>(a.kv.head_bytes));
    append(item, a.kv, head, a.k + item.token * a.k_stride + kv_head * a.k_head_stride, a.k_stride,
           a.v + item.token * a.v_stride + kv_head * a.v_head_stride, a.v_stride,
           a.key_scale == nullptr ? nullptr : a.key_scale + kv_head * a.kv.head_dim,
           static_cast<T*>(nullptr));
  }
}

}  // namespace

void kv_append(const KvAppendArgs& args, int64_t begin, int64_t end) {
  switch (args.kv.dtype) {
    case DType::F32:
      return append_items<float>(args, begin, end);
    case DType::BF16:
      return append_items<bf16>(args, begin, end);
    case DType::I8:
      return append_items<int8_t>(args, begin, end);
    default:
      __builtin_trap();
  }
}

}  // namespace qn::cpu::QN_ISA
