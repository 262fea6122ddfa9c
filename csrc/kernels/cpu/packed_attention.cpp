// Causal attention within packed documents, for training: out = softmax(scale q k^T) v, the
// log-sum-exp (base 2) of each row's scores, and the gradients. Nothing of size length^2 is stored:
// both directions take blocks of 64 queries x 64 keys, and the gradients compute the probabilities
// again from the log-sum-exp (FlashAttention-2, arXiv 2307.08691).
//
//   q, out, dout, dq [tokens, num_heads, head_dim], k, v [tokens, num_kv_heads, head_dim] f32 or
//   bf16; lse [num_heads, tokens]; dk, dv [num_heads, tokens, head_dim] f32, a share per query head
//   item: one query head of one document
//
// Scores are kept transposed, keys x queries, so that a query's maximum, sum and mask live in a
// lane and probabilities leave a block as the operand that the next product wants:
//
//   S^T = K Q^T, O^T = V^T P^T;  dP^T = V dO^T, dV = P^T dO, dK = dS^T Q, dQ^T = K^T dS^T
//
//   accumulation: float32 throughout. Level amx with bf16 tensors multiplies bf16 in tiles and
//   rounds P and dS to bf16 for it; everything else multiplies in float32. Blocks are cut at
//   positions in the document and taken in ascending order; what a row may not see adds exact
//   zeros. So no result depends on the other documents or on threads.
//   bytes per item: the document's q, k, v once, held as operands in the thread's scratch
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"
#if QN_ISA_LEVEL >= 4
#include "kernels/cpu/amx_tile.h"
#endif

namespace qn::cpu::QN_ISA {
namespace {

constexpr int kBlock = kPackedBlock;  // queries, and keys
constexpr int kVecs = kBlock / Vec::kLanes;
constexpr float kLog2E = 1.44269504f;
constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLowest = -1e30f;  // a maximum before any score: differences stay numbers

QN_INLINE int lanes_left(int64_t i, int64_t end) {
  return end - i < Vec::kLanes ? static_cast<int>(end - i) : Vec::kLanes;
}

/// Operands of products of blocks, C [m, n] = A [m, k] B [k, n], as plain float matrices.
struct FloatOperands {
  using Element = float;
  static constexpr int64_t kDepth = 1;  // rows of B that lie interleaved

  static float element(float x) { return x; }
  static float element(bf16 x) { return math::QN_ISA::bf16_to_float(x); }

  static void store_rows(Element* a, Vec x) { x.store(a); }
  /// Rows k and k + 1 of B, sixteen columns.
  static void store_pair(Element* b, int64_t b_stride, Vec even, Vec odd) {
    even.store(b);
    odd.store(b + b_stride);
  }

  static void multiply(const Element* a, int64_t a_stride, const Element* b, int64_t b_stride,
                       int64_t m, int64_t n, int64_t k, float* c, int64_t c_stride, bool add) {
    constexpr int kRows = QN_ISA_LEVEL >= 2 ? 8 : 4, kColumns = QN_ISA_LEVEL >= 2 ? 2 : 1;
    for (int64_t row = 0; row < m; row += kRows) {
      for (int64_t column = 0; column < n; column += kColumns * Vec::kLanes) {
        float* const target = c + row * c_stride + column;
        Vec acc[kRows][kColumns];
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kColumns; ++v) {
            acc[r][v] = add ? Vec::load(target + r * c_stride + v * Vec::kLanes) : Vec::zero();
          }
        }
        const float* left = a + row * a_stride;
        const float* right = b + column;
        for (int64_t i = 0; i < k; ++i, right += b_stride) {
          Vec line[kColumns];
          for (int v = 0; v < kColumns; ++v) line[v] = Vec::load(right + v * Vec::kLanes);
          for (int r = 0; r < kRows; ++r) {
            const Vec x(left[r * a_stride + i]);
            for (int v = 0; v < kColumns; ++v) acc[r][v] = fma(x, line[v], acc[r][v]);
          }
        }
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kColumns; ++v) {
            acc[r][v].store(target + r * c_stride + v * Vec::kLanes);
          }
        }
      }
    }
  }
};

#if QN_ISA_LEVEL >= 4
/// The same as bf16 for tiles: A row-major, rows of B in interleaved pairs.
struct TileOperands {
  using Element = bf16;
  static constexpr int64_t kDepth = 2;

  static bf16 element(bf16 x) { return x; }

  static QN_INLINE void store_rows(Element* a, Vec x) { x.store(a); }
  static QN_INLINE void store_pair(Element* b, int64_t, Vec even, Vec odd) {
    const __m512i low = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));
    const __m512i order = _mm512_setr_epi32(
        0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
        0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
    _mm512_storeu_si512(b, _mm512_permutexvar_epi16(order, low));
  }

  static void multiply(const Element* a, int64_t a_stride, const Element* b, int64_t b_stride,
                       int64_t m, int64_t n, int64_t k, float* c, int64_t c_stride, bool add) {
    const int64_t a_bytes = a_stride * 2, b_bytes = b_stride * 4, c_bytes = c_stride * 4;
    for (int64_t row = 0; row < m; row += 32) {
      for (int64_t column = 0; column < n; column += 32) {
        float* const target = c + row * c_stride + column;
        if (add) {
          _tile_loadd(0, target, c_bytes);
          _tile_loadd(1, target + 16, c_bytes);
          _tile_loadd(2, target + 16 * c_stride, c_bytes);
          _tile_loadd(3, target + 16 * c_stride + 16, c_bytes);
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t i = 0; i < k; i += 32) {
          const bf16* left = a + row * a_stride + i;
          const bf16* right = b + i * b_stride + 2 * column;
          multiply_tiles<false, 2, 2>(left, left + 16 * a_stride, a_bytes, right, right + 32,
                                      b_bytes);
        }
        _tile_stored(0, target, c_bytes);
        _tile_stored(1, target + 16, c_bytes);
        _tile_stored(2, target + 16 * c_stride, c_bytes);
        _tile_stored(3, target + 16 * c_stride + 16, c_bytes);
      }
    }
  }
};
#endif

/// One head of one document in a tensor [tokens, heads, head_dim].
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

/// Sizes of an item; rows and columns of operands are filled up with zeros.
struct Shape {
  int64_t length, padded_length;  // of the document
  int64_t head_dim, depth;        // head_dim up to whole tiles

  int64_t keys_stride() const { return padded_length + 32; }  // no power of two
};

/// A [rows, depth] = source rows [first, first + rows).
template <class Operands, typename T>
void pack_rows(typename Operands::Element* a, const Rows<const T>& source, int64_t first,
               int64_t rows, const Shape& s) {
  for (int64_t row = 0; row < rows; ++row, a += s.depth) {
    const int64_t filled = first + row < s.length ? s.head_dim : 0;
    for (int64_t i = 0; i < s.depth; i += Vec::kLanes) {
      const Vec x =
          i < filled ? Vec::load(source[first + row] + i, lanes_left(i, filled)) : Vec::zero();
      Operands::store_rows(a + i, x);
    }
  }
}

/// A [depth, padded_length] = the source transposed.
template <class Operands, typename T>
void pack_transposed(typename Operands::Element* a, const Rows<const T>& source, const Shape& s) {
  memset(a, 0, static_cast<size_t>(s.depth * s.keys_stride()) * sizeof(*a));
  for (int64_t row = 0; row < s.length; ++row) {
    const T* x = source[row];
    for (int64_t i = 0; i < s.head_dim; ++i) a[i * s.keys_stride() + row] = Operands::element(x[i]);
  }
}

/// B [depth, kBlock] = source rows [first, first + kBlock) transposed.
template <class Operands, typename T>
void pack_columns(typename Operands::Element* b, const Rows<const T>& source, int64_t first,
                  const Shape& s) {
  constexpr int64_t kDepth = Operands::kDepth;
  memset(b, 0, static_cast<size_t>(s.depth * kBlock) * sizeof(*b));
  for (int64_t row = 0; row < kBlock && first + row < s.length; ++row) {
    const T* x = source[first + row];
    for (int64_t i = 0; i < s.head_dim; ++i) {
      b[(i / kDepth * kBlock + row) * kDepth + i % kDepth] = Operands::element(x[i]);
    }
  }
}

/// B [kBlock, depth] = source rows [first, first + kBlock).
template <class Operands, typename T>
void pack_block(typename Operands::Element* b, const Rows<const T>& source, int64_t first,
                const Shape& s) {
  for (int64_t row = 0; row < kBlock; row += 2) {
    for (int64_t i = 0; i < s.depth; i += Vec::kLanes) {
      const auto load = [&](int64_t at) {
        return at < s.length && i < s.head_dim
                   ? Vec::load(source[at] + i, lanes_left(i, s.head_dim))
                   : Vec::zero();
      };
      Operands::store_pair(b + row * s.depth + i * Operands::kDepth, s.depth, load(first + row),
                           load(first + row + 1));
    }
  }
}

/// Scores that a query may not see become -inf.
void mask(float* scores, int64_t first_key, int64_t first_query, int64_t window) {
  const int64_t last_key = first_key + kBlock - 1, last_query = first_query + kBlock - 1;
  const bool all_past = last_key <= first_query;
  if (all_past && (window == 0 || first_key > last_query - window)) return;
  for (int64_t key = 0; key < kBlock; ++key) {
    for (int64_t query = 0; query < kBlock; ++query) {
      const int64_t distance = first_query + query - (first_key + key);
      if (distance < 0 || (window > 0 && distance >= window)) {
        scores[key * kBlock + query] = kMinusInfinity;
      }
    }
  }
}

/// First key block that a block of queries sees.
int64_t first_block(int64_t query, int64_t window) {
  return window > 0 && query >= window ? (query - window + 1) / kBlock * kBlock : 0;
}

/// Hands out a thread's scratch, 64-byte aligned.
class Scratch {
 public:
  explicit Scratch(void* base) : next_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* const result = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return result;
  }

 private:
  char* next_;
};

template <typename T>
Rows<const T> head_of(const void* tensor, const PackedStrides& strides, int64_t token,
                      int64_t head) {
  return {static_cast<const T*>(tensor) + token * strides.token + head * strides.head,
          strides.token};
}

Shape shape_of(const PackedAttentionArgs& a, const PackedAttentionItem& item) {
  return {item.length, packed_length(item.length), a.head_dim, packed_depth(a.head_dim)};
}

/// The transposed block [depth, kBlock], column by column times factor[column], to rows of `out`.
template <typename T>
void write_transposed(const Rows<T>& out, const float* block, const float* factor, int64_t first,
                      const Shape& s) {
  float row[kAttentionMaxHeadDim];
  for (int64_t query = 0; query < kBlock && first + query < s.length; ++query) {
    for (int64_t i = 0; i < s.head_dim; ++i) row[i] = block[i * kBlock + query];
    for (int64_t i = 0; i < s.head_dim; i += Vec::kLanes) {
      const int n = lanes_left(i, s.head_dim);
      (Vec::load(row + i, n) * Vec(factor[query])).store(out[first + query] + i, n);
    }
  }
}

template <class Operands, typename T>
void forward(const PackedAttentionArgs& a, const PackedAttentionItem& item, void* memory) {
  using Element = typename Operands::Element;
  const Shape s = shape_of(a, item);
  const int64_t kv_head = item.head / a.group;
  const auto q = head_of<T>(a.q, a.q_strides, item.token, item.head);
  const auto k = head_of<T>(a.k, a.k_strides, item.token, kv_head);
  const auto v = head_of<T>(a.v, a.v_strides, item.token, kv_head);
  const Rows<T> out{
      static_cast<T*>(a.out) + item.token * a.out_strides.token + item.head * a.out_strides.head,
      a.out_strides.token};
  Scratch scratch(memory);
  auto* keys = scratch.take<Element>(s.padded_length * s.depth);
  auto* values = scratch.take<Element>(s.depth * s.keys_stride());
  auto* queries = scratch.take<Element>(s.depth * kBlock);
  auto* probs = scratch.take<Element>(kBlock * kBlock);
  auto* scores = scratch.take<float>(kBlock * kBlock);
  auto* result = scratch.take<float>(s.depth * kBlock);
  pack_rows<Operands>(keys, k, 0, s.padded_length, s);
  pack_transposed<Operands>(values, v, s);
  const Vec factor(a.scale * kLog2E);
  for (int64_t query = 0; query < s.length; query += kBlock) {
    pack_columns<Operands>(queries, q, query, s);
    Vec largest[kVecs], total[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      largest[i] = Vec(kLowest);
      total[i] = Vec::zero();
    }
    const int64_t first = first_block(query, a.window);
    for (int64_t key = first; key <= query; key += kBlock) {
      Operands::multiply(keys + key * s.depth, s.depth, queries, kBlock, kBlock, kBlock, s.depth,
                         scores, kBlock, false);
      mask(scores, key, query, a.window);
      for (int i = 0; i < kVecs; ++i) {
        float* column = scores + i * Vec::kLanes;
        Vec top(kMinusInfinity);
        for (int row = 0; row < kBlock; ++row) top = max(top, Vec::load(column + row * kBlock));
        const Vec raised = max(largest[i], top * factor);
        const Vec rescale = exp2(largest[i] - raised);
        largest[i] = raised;
        Vec sum = Vec::zero();
        for (int row = 0; row < kBlock; row += 2) {
          const float* pair = column + row * kBlock;
          const Vec even = exp2(fma(Vec::load(pair), factor, Vec::zero() - raised));
          const Vec odd = exp2(fma(Vec::load(pair + kBlock), factor, Vec::zero() - raised));
          sum = sum + (even + odd);
          Operands::store_pair(probs + row * kBlock + i * Vec::kLanes * Operands::kDepth, kBlock,
                               even, odd);
        }
        total[i] = fma(total[i], rescale, sum);
        if (key == first) continue;
        float* rows = result + i * Vec::kLanes;
        for (int64_t row = 0; row < s.depth; ++row, rows += kBlock) {
          (Vec::load(rows) * rescale).store(rows);
        }
      }
      Operands::multiply(values + key, s.keys_stride(), probs, kBlock, s.depth, kBlock, kBlock,
                         result, kBlock, key != first);
    }
    float sums[kBlock], maxima[kBlock], inverse[kBlock];
    for (int i = 0; i < kVecs; ++i) {
      total[i].store(sums + i * Vec::kLanes);
      largest[i].store(maxima + i * Vec::kLanes);
      (Vec(1.0f) / total[i]).store(inverse + i * Vec::kLanes);
    }
    write_transposed(out, result, inverse, query, s);
    float* lse = a.lse + item.head * a.tokens + item.token + query;
    for (int64_t i = 0; i < kBlock && query + i < s.length; ++i) {
      lse[i] = maxima[i] + log2f(sums[i]);
    }
  }
}

template <class Operands, typename T>
void backward(const PackedAttentionArgs& a, const PackedAttentionItem& item, void* memory) {
  using Element = typename Operands::Element;
  const Shape s = shape_of(a, item);
  const int64_t kv_head = item.head / a.group;
  const auto q = head_of<T>(a.q, a.q_strides, item.token, item.head);
  const auto k = head_of<T>(a.k, a.k_strides, item.token, kv_head);
  const auto v = head_of<T>(a.v, a.v_strides, item.token, kv_head);
  const auto out = head_of<T>(a.out, a.out_strides, item.token, item.head);
  const auto dout = head_of<T>(a.dout, a.dout_strides, item.token, item.head);
  const Rows<T> dq{
      static_cast<T*>(a.dq) + item.token * a.dq_strides.token + item.head * a.dq_strides.head,
      a.dq_strides.token};
  Scratch scratch(memory);
  auto* keys = scratch.take<Element>(s.padded_length * s.depth);
  auto* values = scratch.take<Element>(s.padded_length * s.depth);
  auto* keys_transposed = scratch.take<Element>(s.depth * s.keys_stride());
  auto* queries = scratch.take<Element>(s.depth * kBlock);
  auto* douts = scratch.take<Element>(s.depth * kBlock);
  auto* query_rows = scratch.take<Element>(kBlock * s.depth);
  auto* dout_rows = scratch.take<Element>(kBlock * s.depth);
  auto* probs = scratch.take<Element>(kBlock * kBlock);
  auto* dscores = scratch.take<Element>(kBlock * kBlock);       // as A
  auto* dscore_pairs = scratch.take<Element>(kBlock * kBlock);  // as B
  auto* scores = scratch.take<float>(kBlock * kBlock);
  auto* dprobs = scratch.take<float>(kBlock * kBlock);
  auto* dquery = scratch.take<float>(s.depth * kBlock);
  auto* dkeys = scratch.take<float>(s.padded_length * s.depth);
  auto* dvalues = scratch.take<float>(s.padded_length * s.depth);
  pack_rows<Operands>(keys, k, 0, s.padded_length, s);
  pack_rows<Operands>(values, v, 0, s.padded_length, s);
  pack_transposed<Operands>(keys_transposed, k, s);
  memset(dkeys, 0, static_cast<size_t>(s.padded_length * s.depth) * sizeof(float));
  memset(dvalues, 0, static_cast<size_t>(s.padded_length * s.depth) * sizeof(float));
  float ones[kBlock], minus_lse[kBlock], delta[kBlock];
  for (float& one : ones) one = 1.0f;
  const Vec factor(a.scale * kLog2E), scale(a.scale);
  for (int64_t query = 0; query < s.length; query += kBlock) {
    pack_columns<Operands>(queries, q, query, s);
    pack_columns<Operands>(douts, dout, query, s);
    pack_block<Operands>(query_rows, q, query, s);
    pack_block<Operands>(dout_rows, dout, query, s);
    const float* lse = a.lse + item.head * a.tokens + item.token + query;
    for (int64_t i = 0; i < kBlock; ++i) {
      minus_lse[i] = delta[i] = 0;
      if (query + i >= s.length) continue;
      minus_lse[i] = -lse[i];
      Vec products = Vec::zero();
      for (int64_t dim = 0; dim < s.head_dim; dim += Vec::kLanes) {
        const int n = lanes_left(dim, s.head_dim);
        products =
            fma(Vec::load(out[query + i] + dim, n), Vec::load(dout[query + i] + dim, n), products);
      }
      delta[i] = sum(products);
    }
    const int64_t first = first_block(query, a.window);
    for (int64_t key = first; key <= query; key += kBlock) {
      Operands::multiply(keys + key * s.depth, s.depth, queries, kBlock, kBlock, kBlock, s.depth,
                         scores, kBlock, false);
      Operands::multiply(values + key * s.depth, s.depth, douts, kBlock, kBlock, kBlock, s.depth,
                         dprobs, kBlock, false);
      mask(scores, key, query, a.window);
      for (int i = 0; i < kVecs; ++i) {
        const Vec shift = Vec::load(minus_lse + i * Vec::kLanes);
        const Vec mean = Vec::load(delta + i * Vec::kLanes);
        for (int row = 0; row < kBlock; row += 2) {
          Vec ds[2];
          for (int r = 0; r < 2; ++r) {
            const int64_t at = (row + r) * kBlock + i * Vec::kLanes;
            const Vec p = exp2(fma(Vec::load(scores + at), factor, shift));
            ds[r] = p * (Vec::load(dprobs + at) - mean) * scale;
            Operands::store_rows(probs + at, p);
            Operands::store_rows(dscores + at, ds[r]);
          }
          Operands::store_pair(dscore_pairs + row * kBlock + i * Vec::kLanes * Operands::kDepth,
                               kBlock, ds[0], ds[1]);
        }
      }
      Operands::multiply(probs, kBlock, dout_rows, s.depth, kBlock, s.depth, kBlock,
                         dvalues + key * s.depth, s.depth, true);
      Operands::multiply(dscores, kBlock, query_rows, s.depth, kBlock, s.depth, kBlock,
                         dkeys + key * s.depth, s.depth, true);
      Operands::multiply(keys_transposed + key, s.keys_stride(), dscore_pairs, kBlock, s.depth,
                         kBlock, kBlock, dquery, kBlock, key != first);
    }
    write_transposed(dq, dquery, ones, query, s);
  }
  for (int64_t row = 0; row < s.length; ++row) {
    const int64_t at = (item.head * a.tokens + item.token + row) * s.head_dim;
    const size_t bytes = static_cast<size_t>(s.head_dim) * sizeof(float);
    memcpy(a.dk_share + at, dkeys + row * s.depth, bytes);
    memcpy(a.dv_share + at, dvalues + row * s.depth, bytes);
  }
}

/// The shares of a kv head's query heads, in ascending order.
template <typename T>
void sum_shares(const PackedAttentionArgs& a, const float* shares, void* out,
                const PackedStrides& strides, int64_t token, int64_t kv_head) {
  T* const row = static_cast<T*>(out) + token * strides.token + kv_head * strides.head;
  for (int64_t dim = 0; dim < a.head_dim; dim += Vec::kLanes) {
    const int n = lanes_left(dim, a.head_dim);
    Vec total = Vec::zero();
    for (int64_t head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head) {
      total = total + Vec::load(shares + (head * a.tokens + token) * a.head_dim + dim, n);
    }
    total.store(row + dim, n);
  }
}

}  // namespace

void packed_attention(const PackedAttentionArgs& args, int64_t begin, int64_t end, void* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    if (args.dtype == DType::F32) {
      forward<FloatOperands, float>(args, args.items[i], scratch);
      continue;
    }
#if QN_ISA_LEVEL >= 4
    const TileScope tiles;
    forward<TileOperands, bf16>(args, args.items[i], scratch);
#else
    forward<FloatOperands, bf16>(args, args.items[i], scratch);
#endif
  }
}

void packed_attention_bwd(const PackedAttentionArgs& args, int64_t begin, int64_t end,
                          void* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    if (args.dtype == DType::F32) {
      backward<FloatOperands, float>(args, args.items[i], scratch);
      continue;
    }
#if QN_ISA_LEVEL >= 4
    const TileScope tiles;
    backward<TileOperands, bf16>(args, args.items[i], scratch);
#else
    backward<FloatOperands, bf16>(args, args.items[i], scratch);
#endif
  }
}

void packed_attention_bwd_sum(const PackedAttentionArgs& args, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t kv_head = 0; kv_head < args.num_kv_heads; ++kv_head) {
      if (args.dtype == DType::F32) {
        sum_shares<float>(args, args.dk_share, args.dk, args.dk_strides, token, kv_head);
        sum_shares<float>(args, args.dv_share, args.dv, args.dv_strides, token, kv_head);
      } else {
        sum_shares<bf16>(args, args.dk_share, args.dk, args.dk_strides, token, kv_head);
        sum_shares<bf16>(args, args.dv_share, args.dv, args.dv_strides, token, kv_head);
      }
    }
  }
}

}  // namespace qn::cpu::QN_ISA
