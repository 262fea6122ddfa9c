// Everything between the qkv projection and attention in one pass: bias, QK-norm, rotary embedding
// and LogN scale of the query heads, the scale that an int8 cache's keys are divided by, and the
// keys and values written to the paged cache, as bf16 or as int8 with one scale per row. float32
// inside; a value is rounded once, when it is stored.
//
//   rope     pairs (i, i + head_dim / 2): (a, b) -> (a cos - b sin, b cos + a sin)
//   block    one token, 16 heads at a time; eight lanes have a head, each two vectors of eight
//            elements that are half a head apart, so a pair meets in one lane
//   bytes    bf16 cache: reads 2 and writes 2 per element of qkv; cos, sin and the norm weights
//            once per token, through shared memory; a bias 2 more per element (gemm_*.cu can add
//            it free)
//   shared   12 bytes per head_dim
//   roofline whole sectors, one access per vector: the bandwidth of global memory limits a
//            prefill, latency (one load after another's address) a decode step
#include "kernels/cuda/kv_pages.cuh"

namespace qn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 8;  // of a head
constexpr int kMaxHalf = 64;

struct alignas(16) Shared {
  float cos[kMaxHalf], sin[kMaxHalf];
  bf16 q_norm[2 * kMaxHalf], k_norm[2 * kMaxHalf];
};

QN_DEV void add(float (&to)[8], const bf16* from) {
  float v[8];
  load(v, from);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] += v[i];
}

QN_DEV void normalise(float (&a)[8], float (&b)[8], const bf16* weight, int half, int head_dim,
                      float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += a[i] * a[i] + b[i] * b[i];
  const float scale = rsqrt_approx(lane_sum<kLanes>(sum) / static_cast<float>(head_dim) + eps);
  float low[8], high[8];
  load(low, weight);
  load(high, weight + half);
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i] *= scale * low[i], b[i] *= scale * high[i];
}

/// Writes a row of the cache; `a` and `b` are this lane's part when `active`.
QN_DEV void write_row(const KvPages& kv, int slot, int head, bool is_value, const float (&a)[8],
                      const float (&b)[8], int begin, int half, bool active) {
  const int page_tokens = 1 << kv.page_shift, row = slot & (page_tokens - 1);
  const KvHead to = kv_head(kv, slot >> kv.page_shift, head);
  char* out = to.keys + row * kv_row_bytes(kv) + (is_value ? to.value_offset : 0);
  if (kv.bits == 16) {
    if (active) {
      store(reinterpret_cast<bf16*>(out) + begin, a);
      store(reinterpret_cast<bf16*>(out) + begin + half, b);
    }
    return;
  }
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fmaxf(fabsf(a[i]), fabsf(b[i])));
  largest = lane_max<kLanes>(active ? largest : 0.0f);
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  if (!active) return;
  st8(out + begin, round_to_int8(a, inverse));
  st8(out + begin + half, round_to_int8(b, inverse));
  if (begin == 0) {
    float* scales = reinterpret_cast<float*>(to.keys + to.scale_offset);
    scales[row + (is_value ? page_tokens : 0)] = largest / 127.0f;
  }
}

__global__ __launch_bounds__(kThreads) void rope_kernel(RopeKvArgs args) {
  Shared& shared = shared_as<Shared>();
  const int64_t token = blockIdx.x;
  const int head_dim = args.kv.head_dim, half = head_dim / 2;
  const bool norm = args.q_norm != nullptr;
  const int64_t table = static_cast<int64_t>(args.positions[token]) * half;
#pragma unroll 1
  for (int i = threadIdx.x * 4; i < half; i += kThreads * 4) {
    st16(&shared.cos[i], ld16(args.cos + table + i));
    st16(&shared.sin[i], ld16(args.sin + table + i));
  }
  if (norm) {
#pragma unroll 1
    for (int i = threadIdx.x * 8; i < head_dim; i += kThreads * 8) {
      st16(&shared.q_norm[i], ld16(static_cast<const bf16*>(args.q_norm) + i));
      st16(&shared.k_norm[i], ld16(static_cast<const bf16*>(args.k_norm) + i));
    }
  }
  __syncthreads();

  const int begin = threadIdx.x % kLanes * 8;
  const bool active = begin < half;
  const int column = active ? begin : 0;
  float cos[8], sin[8];  // the same columns of every head
#pragma unroll
  for (int i = 0; i < 8; ++i) cos[i] = shared.cos[column + i], sin[i] = shared.sin[column + i];
  const int slot = args.slots[token];
  const float query_scale = args.query_scale != nullptr ? args.query_scale[token] : 1.0f;
  const bf16* qkv = static_cast<const bf16*>(args.qkv) + token * args.qkv_stride;
  const int heads = args.num_heads + 2 * args.kv.num_kv_heads;
  // Every lane takes part in the reductions, also those whose head does not exist.
  for (int first = 0; first < heads; first += kThreads / kLanes) {
    const int head = first + threadIdx.x / kLanes;
    const bool exists = active && head < heads;
    const int kv_head_index = head - args.num_heads;
    const bool is_query = kv_head_index < 0, is_value = kv_head_index >= args.kv.num_kv_heads;
    float a[8] = {}, b[8] = {};
    if (exists) {
      load(a, qkv + head * head_dim + begin);
      load(b, qkv + head * head_dim + begin + half);
      if (args.bias != nullptr) {
        const bf16* bias = static_cast<const bf16*>(args.bias) + head * head_dim + begin;
        add(a, bias);
        add(b, bias + half);
      }
    }
    if (norm) {
      float na[8], nb[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) na[i] = a[i], nb[i] = b[i];
      normalise(na, nb, (is_query ? shared.q_norm : shared.k_norm) + column, half, head_dim,
                args.eps);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        a[i] = is_value ? a[i] : na[i];
        b[i] = is_value ? b[i] : nb[i];
      }
    }
    if (!is_value) {
      float factor[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) factor[i] = is_query ? query_scale : 1.0f;
      if (args.key_scale != nullptr && exists) {
        const int owner = is_query ? head / (args.num_heads / args.kv.num_kv_heads) : kv_head_index;
        const float* scale = args.key_scale + owner * head_dim + begin;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          float v[4];
          load(v, scale + i);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (is_query)
              factor[i + j] *= v[j];
            else
              factor[i + j] /= v[j];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float c = cos[i] * factor[i], s = sin[i] * factor[i];
        const float x = a[i], y = b[i];
        a[i] = x * c - y * s;
        b[i] = y * c + x * s;
      }
    }
    if (is_query) {
      if (exists) {
        bf16* q = static_cast<bf16*>(args.q) + token * args.q_stride + head * head_dim + begin;
        store(q, a);
        store(q + half, b);
      }
    }
    if (slot >= 0) {
      const bool writes = exists && !is_query;
      const int target = is_query   ? 0
                         : is_value ? kv_head_index - args.kv.num_kv_heads
                                    : kv_head_index;
      write_row(args.kv, slot, target, is_value, a, b, column, half, writes);
    }
  }
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_rope(const qn::cuda::RopeKvArgs* args, void* stream) {
  using namespace qn::cuda;
  if (args->tokens == 0) return 0;
  return launch("rope", rope_kernel, dim3(args->tokens), dim3(kThreads), sizeof(Shared),
                static_cast<cudaStream_t>(stream), *args);
}
