// Causal attention over the paged KV cache, for prefill and decode: out = softmax(scale q k^T) v.
//
//   q, out [tokens, num_heads, head_dim] f32; pages f32 or bf16 (layouts: KvGeometry in args.h)
//   item: up to 32 query rows (tokens x heads) that share a kv head, against a range of parts
//
// A part is 256 keys, cut at absolute positions. Inside it a row takes all its scores, their
// maximum m, p = exp(s - m), l = sum(p) and o = p v; the parts' (m, l, o) are merged in ascending
// order. Decode computes parts in parallel and merges them afterwards, prefill merges as it goes:
// the arithmetic is the same, and no row's depends on its neighbours. Keys that a row may not see
// get the score -inf and thus add an exact zero, so it does not matter which keys an item covers
// beyond those that its rows see.
//
//   accumulation: float32 throughout; level amx with bf16 pages rounds q and p to bf16 and
//   multiplies with tiles (2 x 2 accumulators), everything else multiplies with fma on widened
//   pages bytes per item and key: 2 * head_dim * sizeof(T), read from the cache once for all rows
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"
#if QN_ISA_LEVEL >= 3
#include "kernels/cpu/amx_tile.h"
#endif

namespace qn::cpu::QN_ISA {
namespace {

constexpr int kGroup = 32;  // keys; a group never crosses a page
constexpr int kGroups = kAttentionPart / kGroup;
constexpr int kScoreStride = kAttentionPart + 16;  // 1 KB apart, rows would compete for cache sets
constexpr float kMinusInfinity = -__builtin_inff();

/// Unnormalised result of a part, or of all parts so far.
struct Partial {
  float* out;  // [rows, head_dim]
  float* max;  // [rows]
  float* sum;  // [rows]
};

struct alignas(64) Scratch {
  float scores[kAttentionRows * kScoreStride];
  bf16 probs[kAttentionRows * kAttentionPart];
  float query[kAttentionRows * kAttentionMaxHeadDim];
  float total_out[kAttentionRows * kAttentionMaxHeadDim];
  float part_out[kAttentionRows * kAttentionMaxHeadDim];
  float total_max[kAttentionRows], total_sum[kAttentionRows];
  float part_max[kAttentionRows], part_sum[kAttentionRows];
  float scale[kAttentionRows];
  int64_t keys_begin[kAttentionRows], keys_end[kAttentionRows];  // positions that a row sees
};
static_assert(sizeof(Scratch) <= kAttentionScratchBytes, "ops reserve too little");

/// The groups [begin, end) of a part that an item's rows need.
struct Part {
  int64_t first_key;
  int begin, end;
  const char* keys[kGroups];
  const char* values[kGroups];
};

Part locate(const AttentionArgs& a, const AttentionItem& item, const Scratch& s, int64_t index) {
  Part part;
  part.first_key = index * kAttentionPart;
  const auto group_of = [&](int64_t key) {
    const int64_t group = (key - part.first_key) / kGroup;
    return static_cast<int>(group < 0 ? 0 : group < kGroups ? group : kGroups);
  };
  part.begin = group_of(s.keys_begin[0]);
  part.end = group_of(s.keys_end[item.rows - 1] + kGroup - 1);
  const int64_t value_bytes =
      a.kv.head_dim * (a.kv.dtype == DType::F32 ? 4 : 2);  // of one key, in either layout
  for (int g = part.begin; g < part.end; ++g) {
    const int64_t key = part.first_key + g * kGroup;
    const int64_t slot = key % a.kv.page_tokens;
    const char* head = a.base + item.page_table[key / a.kv.page_tokens] * a.page_stride +
                       item.kv_head * a.kv.head_bytes;
    part.keys[g] = head + slot * 4;
    part.values[g] = head + a.kv.value_offset + slot * value_bytes;
  }
  return part;
}

/// Scores outside [keys_begin, keys_end) become -inf.
void mask_row(const Part& part, int64_t keys_begin, int64_t keys_end, float* scores) {
  const int begin = part.begin * kGroup, end = part.end * kGroup;
  const int64_t first = keys_begin - part.first_key, last = keys_end - part.first_key;
  for (int key = begin; key < end && key < first; ++key) scores[key] = kMinusInfinity;
  for (int key = last > begin ? static_cast<int>(last) : begin; key < end; ++key) {
    scores[key] = kMinusInfinity;
  }
}

float max_score(const Part& part, const float* scores) {
  Vec low(kMinusInfinity), high(kMinusInfinity);
  for (int key = part.begin * kGroup; key < part.end * kGroup; key += kGroup) {
    low = max(low, Vec::load(scores + key));
    high = max(high, Vec::load(scores + key + Vec::kLanes));
  }
  return max(max(low, high));
}

/// total = total merged with part. A row that sees nothing on one side keeps the other unchanged.
__attribute__((noinline)) void merge(const Partial& total, const Partial& part, int64_t rows,
                                     int64_t head_dim) {
  for (int64_t r = 0; r < rows; ++r) {
    if (part.max[r] == kMinusInfinity) continue;
    float* out = total.out + r * head_dim;
    const float* more = part.out + r * head_dim;
    if (total.max[r] == kMinusInfinity) {
      memcpy(out, more, static_cast<size_t>(head_dim) * sizeof(float));
      total.max[r] = part.max[r];
      total.sum[r] = part.sum[r];
      continue;
    }
    const float top = total.max[r] > part.max[r] ? total.max[r] : part.max[r];
    const Vec old_factor = exp(Vec(total.max[r] - top)), new_factor = exp(Vec(part.max[r] - top));
    for (int64_t dim = 0; dim < head_dim; dim += Vec::kLanes) {
      fma(Vec::load(out + dim), old_factor, Vec::load(more + dim) * new_factor).store(out + dim);
    }
    float sum[Vec::kLanes];
    fma(Vec(total.sum[r]), old_factor, Vec(part.sum[r]) * new_factor).store(sum);
    total.sum[r] = sum[0];
    total.max[r] = top;
  }
}

void write_out(const AttentionArgs& a, const AttentionItem& item, const Partial& total) {
  for (int64_t r = 0; r < item.rows; ++r) {
    const int64_t row = item.first_row + r;
    float* out = a.out + (item.token + row / a.group) * a.out_stride +
                 (item.kv_head * a.group + row % a.group) * a.out_head_stride;
    const Vec sum(total.sum[r]);
    for (int64_t dim = 0; dim < a.kv.head_dim; dim += Vec::kLanes) {
      (Vec::load(total.out + r * a.kv.head_dim + dim) / sum).store(out + dim);
    }
  }
}

/// c[r][0 .. 16 V) (+)= sum over i of a[r][i] * b[i][0 .. 16 V), i ascending. b_stride counts
/// columns; the rows of a bf16 b come in interleaved pairs.
template <typename T, int V, int R>
QN_INLINE void multiply_rows(const float* a, int64_t a_stride, const T* b, int64_t b_stride,
                             int64_t n, float* c, int64_t c_stride, bool accumulate) {
  Vec acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      acc[r][v] = accumulate ? Vec::load(c + r * c_stride + v * Vec::kLanes) : Vec::zero();
    }
  }
  for (int64_t i = 0; i < n; i += 2) {
    Vec even[V], odd[V];
    for (int v = 0; v < V; ++v) {
      if constexpr (sizeof(T) == 2) {
        load_pairs(b + i * b_stride + 2 * v * Vec::kLanes, even[v], odd[v]);
      } else {
        even[v] = Vec::load(b + i * b_stride + v * Vec::kLanes);
        odd[v] = Vec::load(b + (i + 1) * b_stride + v * Vec::kLanes);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) acc[r][v] = fma(Vec(a[r * a_stride + i]), even[v], acc[r][v]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(Vec(a[r * a_stride + i + 1]), odd[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v].store(c + r * c_stride + v * Vec::kLanes);
  }
}

// Accumulators in registers: 16 of 32 zmm, 12 of 16 ymm.
constexpr int kVecs = QN_ISA_LEVEL >= 2 ? 2 : 1;
constexpr int kRowBlock = QN_ISA_LEVEL >= 2 ? 8 : QN_ISA_LEVEL == 1 ? 6 : 4;

template <typename T, int V, int R = kRowBlock>
void multiply(int64_t rows, const float* a, int64_t a_stride, const T* b, int64_t b_stride,
              int64_t n, float* c, int64_t c_stride, bool accumulate) {
  for (; rows >= R; rows -= R) {
    multiply_rows<T, V, R>(a, a_stride, b, b_stride, n, c, c_stride, accumulate);
    a += R * a_stride;
    c += R * c_stride;
  }
  if constexpr (R > 1) {
    if (rows > 0) multiply<T, V, R - 1>(rows, a, a_stride, b, b_stride, n, c, c_stride, accumulate);
  }
}

/// The path with fma.
template <typename T>
struct VecPath {
  static void load_query(const float* q, int64_t head_dim, int row, const AttentionItem&,
                         Scratch& s) {
    memcpy(s.query + row * head_dim, q, static_cast<size_t>(head_dim) * sizeof(float));
  }

  static void run_part(const AttentionArgs& a, const AttentionItem& item, const Part& part,
                       Scratch& s, const Partial& result) {
    const int64_t head_dim = a.kv.head_dim;
    constexpr int kStep = kVecs * Vec::kLanes;
    constexpr int kInterleave = sizeof(T) == 2 ? 2 : 1;
    for (int g = part.begin; g < part.end; ++g) {
      const T* keys = reinterpret_cast<const T*>(part.keys[g]);
      for (int key = 0; key < kGroup; key += kStep) {
        multiply<T, kVecs>(item.rows, s.query, head_dim, keys + key * kInterleave, a.kv.page_tokens,
                           head_dim, s.scores + g * kGroup + key, kScoreStride, false);
      }
    }
    for (int r = 0; r < item.rows; ++r) {
      float* scores = s.scores + r * kScoreStride;
      mask_row(part, s.keys_begin[r], s.keys_end[r], scores);
      const Vec scale(s.scale[r]);
      for (int key = part.begin * kGroup; key < part.end * kGroup; key += Vec::kLanes) {
        (Vec::load(scores + key) * scale).store(scores + key);
      }
      result.max[r] = max_score(part, scores);
      const Vec top(result.max[r] == kMinusInfinity ? 0.0f : result.max[r]);
      Vec total = Vec::zero();
      for (int key = part.begin * kGroup; key < part.end * kGroup; key += Vec::kLanes) {
        const Vec p = exp(Vec::load(scores + key) - top);
        p.store(scores + key);
        total = total + p;
      }
      result.sum[r] = sum(total);
    }
    for (int g = part.begin; g < part.end; ++g) {
      const T* values = reinterpret_cast<const T*>(part.values[g]);
      const float* probs = s.scores + g * kGroup;
      const bool accumulate = g > part.begin;
      int64_t dim = 0;
      for (; dim + kStep <= head_dim; dim += kStep) {
        multiply<T, kVecs>(item.rows, probs, kScoreStride, values + dim * kInterleave, head_dim,
                           kGroup, result.out + dim, head_dim, accumulate);
      }
      for (; dim < head_dim; dim += Vec::kLanes) {
        multiply<T, 1>(item.rows, probs, kScoreStride, values + dim * kInterleave, head_dim, kGroup,
                       result.out + dim, head_dim, accumulate);
      }
    }
  }
};

#if QN_ISA_LEVEL >= 3
/// The path with tiles, for bf16 pages. Tiles 0-3 accumulate, 4 and 5 hold 16 rows of queries or
/// probabilities each, 6 and 7 come from the cache.
struct TilePath {
  static constexpr int kDepth = 32;  // dims or keys of one multiplication

  /// Packed [head_dim / 32][rows][32]; the last step is filled up with zeros.
  static void load_query(const float* q, int64_t head_dim, int row, const AttentionItem& item,
                         Scratch& s) {
    bf16* packed = reinterpret_cast<bf16*>(s.query) + row * kDepth;
    for (int64_t dim = 0; dim < head_dim; dim += kDepth) {
      bf16* step = packed + dim * item.rows;
      Vec::load(q + dim).store(step);
      (dim + 16 < head_dim ? Vec::load(q + dim + 16) : Vec::zero()).store(step + 16);
    }
  }

  static TileConfig tile_config(const AttentionItem& item) {
    TileConfig config;
    const int upper = item.rows < 16 ? item.rows : 16, lower = item.rows - upper;
    const int rows[8] = {
        upper, upper, lower ? lower : upper, lower ? lower : upper, upper, lower ? lower : upper,
        16,    16};
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = static_cast<uint8_t>(rows[tile]);
      config.row_bytes[tile] = 64;
    }
    return config;
  }

  /// c [rows, 16 N] = sum over steps of a[step] [rows, 32] * b[step] [16 pairs, 16 N]. Strides in
  /// bytes.
  template <int M, int N>
  static QN_INLINE void multiply(const char* a, int64_t a_step, const char* const* b,
                                 int64_t b_offset, int64_t b_stride, int steps, float* c,
                                 int64_t c_stride) {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (M > 1) _tile_zero(2);
    if constexpr (M > 1 && N > 1) _tile_zero(3);
    for (int step = 0; step < steps; ++step, a += a_step) {
      const char* source = b[step] + b_offset;
      _tile_loadd(4, a, 64);
      _tile_loadd(6, source, b_stride);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N > 1) {
        _tile_loadd(7, source + 64, b_stride);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (M > 1) {
        _tile_loadd(5, a + 16 * 64, 64);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_stride);
    if constexpr (N > 1) _tile_stored(1, c + 16, c_stride);
    if constexpr (M > 1) {
      float* lower = c + 16 * (c_stride / 4);
      _tile_stored(2, lower, c_stride);
      if constexpr (N > 1) _tile_stored(3, lower + 16, c_stride);
    }
  }

  /// 2^x for x <= 0 to a relative 4e-6, far below bf16's rounding of p; 0 from -126 on down.
  static QN_INLINE __m512 exp2(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(9.6181291e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    const __mmask16 visible = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(visible, p, n);
  }

  template <int M>
  static void run_part(const AttentionArgs& a, const AttentionItem& item, const Part& part,
                       Scratch& s, const Partial& result) {
    const int64_t head_dim = a.kv.head_dim;
    const int steps = static_cast<int>((head_dim + kDepth - 1) / kDepth);
    const int64_t key_stride = a.kv.page_tokens * 4;
    for (int g = part.begin; g < part.end; ++g) {
      const char* keys[kAttentionMaxHeadDim / kDepth];
      for (int step = 0; step < steps; ++step) keys[step] = part.keys[g] + step * 16 * key_stride;
      multiply<M, 2>(reinterpret_cast<const char*>(s.query), item.rows * 64, keys, 0, key_stride,
                     steps, s.scores + g * kGroup, kScoreStride * 4);
    }
    constexpr float kLog2E = 1.44269504f;
    for (int r = 0; r < item.rows; ++r) {
      float* scores = s.scores + r * kScoreStride;
      mask_row(part, s.keys_begin[r], s.keys_end[r], scores);
      const float top = max_score(part, scores);
      result.max[r] = top * s.scale[r];
      const float scale2 = s.scale[r] * kLog2E;
      const __m512 scale = _mm512_set1_ps(scale2);
      const __m512 shift = _mm512_set1_ps(top == kMinusInfinity ? 0.0f : -top * scale2);
      Vec total = Vec::zero();
      for (int g = part.begin; g < part.end; ++g) {
        const float* group = scores + g * kGroup;
        const __m512 low = exp2(_mm512_fmadd_ps(_mm512_load_ps(group), scale, shift));
        const __m512 high = exp2(_mm512_fmadd_ps(_mm512_load_ps(group + 16), scale, shift));
        total = total + (Vec(low) + Vec(high));
        _mm512_store_si512(s.probs + (g * kAttentionRows + r) * kDepth,
                           reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
      }
      result.sum[r] = sum(total);
    }
    const char* probs =
        reinterpret_cast<const char*>(s.probs + part.begin * kAttentionRows * kDepth);
    const auto values = [&](auto tiles, int64_t dim) {
      multiply<M, decltype(tiles)::kCount>(probs, kAttentionRows * kDepth * 2,
                                           part.values + part.begin, dim * 4, head_dim * 4,
                                           part.end - part.begin, result.out + dim, head_dim * 4);
    };
    int64_t dim = 0;
    for (; dim + 32 <= head_dim; dim += 32) values(Count<2>{}, dim);
    if (dim < head_dim) values(Count<1>{}, dim);
  }

  static void run_part(const AttentionArgs& a, const AttentionItem& item, const Part& part,
                       Scratch& s, const Partial& result) {
    item.rows > 16 ? run_part<2>(a, item, part, s, result) : run_part<1>(a, item, part, s, result);
  }

 private:
  template <int N>
  struct Count {
    static constexpr int kCount = N;
  };
};
#endif

template <typename Path>
void run_item(const AttentionArgs& a, const AttentionItem& item, Scratch& s) {
  const int64_t head_dim = a.kv.head_dim;
  for (int r = 0; r < item.rows; ++r) {
    const int64_t row = item.first_row + r, token = row / a.group;
    const int64_t head = item.kv_head * a.group + row % a.group;
    Path::load_query(a.q + (item.token + token) * a.q_stride + head * a.q_head_stride, head_dim, r,
                     item, s);
    s.scale[r] = a.query_scale ? a.scale * a.query_scale[item.token + token] : a.scale;
    s.keys_end[r] = item.position + token + 1;
    const int64_t window_begin = s.keys_end[r] - a.window;
    s.keys_begin[r] = a.window > 0 && window_begin > 0 ? window_begin : 0;
  }
  const Partial total{s.total_out, s.total_max, s.total_sum};
  const Partial scratch_part{s.part_out, s.part_max, s.part_sum};
  for (int32_t index = item.part_begin; index < item.part_end; ++index) {
    const Part part = locate(a, item, s, index);
    if (item.partial != nullptr) {
      float* out = item.partial + (index - item.part_begin) * item.partial_stride;
      float* max = out + item.rows * head_dim;
      Path::run_part(a, item, part, s, Partial{out, max, max + kAttentionRows});
    } else if (index == item.part_begin) {
      Path::run_part(a, item, part, s, total);
    } else {
      Path::run_part(a, item, part, s, scratch_part);
      merge(total, scratch_part, item.rows, head_dim);
    }
  }
  if (item.partial == nullptr) write_out(a, item, total);
}

}  // namespace

void attention(const AttentionArgs& args, int64_t begin, int64_t end, void* scratch) {
  Scratch& s = *static_cast<Scratch*>(scratch);
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem& item = args.items[i];
    if (args.kv.dtype == DType::F32) {
      run_item<VecPath<float>>(args, item, s);
      continue;
    }
#if QN_ISA_LEVEL >= 3
    const TileScope tiles(TilePath::tile_config(item));
    run_item<TilePath>(args, item, s);
#else
    run_item<VecPath<bf16>>(args, item, s);
#endif
  }
}

void attention_merge(const AttentionArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem& item = args.items[i];
    const auto part = [&](int64_t index) {
      float* out = item.partial + index * item.partial_stride;
      float* max = out + item.rows * args.kv.head_dim;
      return Partial{out, max, max + kAttentionRows};
    };
    for (int32_t index = 1; index < item.part_end - item.part_begin; ++index) {
      merge(part(0), part(index), item.rows, args.kv.head_dim);
    }
    write_out(args, item, part(0));
  }
}

}  // namespace qn::cpu::QN_ISA
