// Causal attention over the paged KV cache, for prefill and decode: out = softmax(scale q k^T) v.
//
//   q, out [tokens, num_heads, head_dim] f32; pages f32 or bf16 (layouts: KvGeometry in args.h)
//   item: up to 32 query rows (tokens x heads) that share a kv head, against a range of parts
//
// Scores are scaled by scale log2(e) and thus exponents of two. A row takes its keys in blocks of
// 128, cut at absolute positions, with an online softmax: o = o 2^(m - m') + p v,
// l = l 2^(m - m') + sum(p), p = 2^(s - m'), where m' >= m follows the largest score. Every
// kAttentionPart keys m, l and o start afresh, and the parts are merged in ascending order. Decode
// computes parts in parallel and merges them afterwards, prefill merges as it goes: the arithmetic
// is the same, and no row's depends on its neighbours. Keys that a row may not see get the score
// -inf and thus add an exact zero, so it does not matter which keys an item covers beyond those
// that its rows see.
//
//   accumulation: float32 throughout. f32 pages at every level, and bf16 and int8 ones up to
//   avx512, are multiplied with fma on widened pages (attention_vec.h). avx512_bf16 and amx round q
//   and p to bf16, p from fixed point (attention_bf16.h), and multiply with vdpbf16ps
//   (attention_pairs.h) or tiles (attention_tiles.h). The codes of int8 pages become bf16 or
//   float32, which hold them exactly, and their scales multiply scores and probabilities.
//   bytes per item and key: 2 * head_dim * sizeof(T), read from the cache once for all rows
#include "kernels/cpu/attention_vec.h"
#if QN_ISA_LEVEL >= 4
#include "kernels/cpu/attention_tiles.h"
#elif QN_ISA_LEVEL == 3
#include "kernels/cpu/attention_pairs.h"
#endif

namespace qn::cpu::QN_ISA {
namespace {

template <typename Path>
void run_item(const AttentionArgs& a, const AttentionItem& item, Scratch& s) {
  constexpr float kLog2E = 1.44269504f;
  for (int r = 0; r < item.rows; ++r) {
    const int64_t row = item.first_row + r, token = row / a.group;
    const int64_t head = item.kv_head * a.group + row % a.group;
    const float factor = a.query_scale ? a.query_scale[item.token + token] : 1.0f;
    const float* q = a.q + (item.token + token) * a.q_stride + head * a.q_head_stride;
    float multiplied[kAttentionMaxHeadDim];
    if (a.key_scale != nullptr) {
      const float* key_scale = a.key_scale + item.kv_head * a.kv.head_dim;
      for (int64_t dim = 0; dim < a.kv.head_dim; dim += Vec::kLanes) {
        (Vec::load(q + dim) * Vec::load(key_scale + dim)).store(multiplied + dim);
      }
      q = multiplied;
    }
    Path::load_query(q, Vec(a.scale * factor * kLog2E), a.kv.head_dim, r, item, s);
    s.keys_end[r] = item.position + token + 1;
    s.keys_begin[r] = a.window > 0 ? greatest(s.keys_end[r] - a.window, 0) : 0;
    s.total_sum[r] = 0;
  }
  Path::run(a, item, s, PartResults{a, item, s});
  if (item.partial == nullptr) {
    write_out(a, item, {s.total_out, s.total_max, s.total_sum});
  }
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
#if QN_ISA_LEVEL >= 4
    const TileScope tiles(TilePath::tile_config(item));
    run_item<TilePath>(args, item, s);
#elif QN_ISA_LEVEL == 3
    run_item<PairPath>(args, item, s);
#else
    run_item<VecPath<bf16>>(args, item, s);
#endif
  }
}

void attention_merge(const AttentionArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem& item = args.items[i];
    const auto part = [&](int64_t index) {
      float* const max = item.partial + index * item.partial_stride;
      float* const sum = max + kAttentionRows;
      return Partial{sum + kAttentionRows, max, sum};
    };
    for (int32_t index = 1; index < item.part_end - item.part_begin; ++index) {
      merge(part(0), part(index), item.rows, args.kv.head_dim);
    }
    write_out(args, item, part(0));
  }
}

}  // namespace qn::cpu::QN_ISA
