// Draws a token per row of logits on the device (SampleArgs in kernels.h), without sorting them.
//
//   order    tokens are ranked by (logit, lower id first), or by id alone when nothing is
//            filtered: the orders in which csrc/runtime/sampler.cpp adds up weights
//   select   one question, asked up to three times (the k-th token, the end of top_p, the draw):
//            at which token does the running sum of counts or weights, taken in rank order, pass a
//            target? A histogram over 2048 bins of the distance to the largest logit (1/64 of a
//            power of two each) leaves one bin; if it holds more than 512 tokens, histograms over
//            bits of the rank follow; the rest is summed pair by pair
//   sums     integers (weights in units of 2^-31 of the largest): atomics in any order give one
//            result
//   block    one row; its logits come from L2 after the first pass
//   bytes    4 per logit and pass: 1 greedy, 3 without filters, 2 more for top_k and for top_p
//            each
//   shared   31 KB
//   roofline a block pulls about 64 bytes per cycle from L2: about 10 us per pass over 152 000
//            logits, and as many rows as multiprocessors at the same time
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {
namespace {

using Wide = unsigned long long;

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
constexpr int kBins = 2048, kBinBits = 11;
constexpr int kList = 512;
constexpr float kUnit = 2147483648.0f;  // weight of the likeliest token

struct Shared {
  Wide weight[kBins];
  uint32_t count[kBins];
  Wide warp_sum[kWarps];
  Wide list_rank[kList];
  uint32_t list_weight[kList];
  uint32_t list_size;
  // What the last step found.
  uint32_t bin, bin_count;
  Wide before;  // sum ahead of the bin
  Wide rank;
  uint32_t weight_found;
};

/// Larger for larger floats; NaN is looked for apart.
QN_DEV uint32_t order_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

QN_DEV Wide multiply_high(Wide a, Wide b) {
  const Wide a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
  const Wide middle = a1 * b0 + (a0 * b0 >> 32);
  return a1 * b1 + (middle >> 32) + (((middle & 0xffffffffu) + a0 * b1) >> 32);
}

/// 53 random bits at the top of a word: Philox4x32-10, as Sampler::uniform.
QN_DEV Wide random_bits(uint64_t seed, uint64_t index) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const Wide a = static_cast<Wide>(0xD2511F53u) * c0, b = static_cast<Wide>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b), c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return (static_cast<Wide>(c1) << 32 | c0) >> 11 << 11;
}

/// One row and the tokens of it that are still in the running.
class Row {
 public:
  QN_DEV Row(const SampleArgs& args, Shared& shared)
      : shared_(shared),
        logits_(args.logits + blockIdx.x * args.stride),
        vocab_(static_cast<int>(args.vocab)) {}

  /// Finds the largest logit; false when there is nothing to draw from.
  QN_DEV bool find_largest() {
    Wide best = 0;
    for (int id = threadIdx.x; id < vocab_; id += kThreads) {
      const float x = logits_[id];
      Wide rank = static_cast<Wide>(order_of(x)) << 32 | (0xffffffffu - id);
      if (!(x < INFINITY)) rank = ~0ull;  // NaN or infinity
      best = rank > best ? rank : best;
    }
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const Wide other = __shfl_xor_sync(kAllLanes, best, lanes);
      best = other > best ? other : best;
    }
    if (threadIdx.x % kWarp == 0) shared_.warp_sum[threadIdx.x / kWarp] = best;
    __syncthreads();
    for (int warp = 0; warp < kWarps; ++warp) {
      const Wide other = shared_.warp_sum[warp];
      best = other > best ? other : best;
    }
    __syncthreads();
    if (best == ~0ull || best >> 32 == order_of(-INFINITY)) return false;
    likeliest_ = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
    largest_ = logits_[likeliest_];
    return true;
  }

  QN_DEV int likeliest() const { return likeliest_; }

  /// `scale`: log2(e) / temperature.
  QN_DEV void start(float scale, bool by_id) {
    scale_ = scale;
    by_id_ = by_id;
    cut_ = 0;
    min_weight_ = 0;
  }
  /// Drops tokens that rank below `rank`.
  QN_DEV void cut_below(Wide rank) { cut_ = rank; }
  QN_DEV void require_weight(uint32_t weight) { min_weight_ = weight; }

  /// Fills the histogram over the distance to the largest logit; returns the sum of all weights.
  QN_DEV Wide fill_histogram() {
    clear_histogram();
    for (int id = threadIdx.x; id < vocab_; id += kThreads) {
      const float x = logits_[id];
      const uint32_t weight = weight_of(x);
      if (!keeps(x, id, weight)) continue;
      add(bin_of(x, id), weight);
    }
    __syncthreads();
    Wide total = 0;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) total += shared_.weight[bin];
    return block_sum(total);
  }

  /// Where the running sum passes `target`, of weights or, without `weighted`, of tokens. Needs
  /// fill_histogram. Leaves rank and weight in shared memory.
  QN_DEV void find(Wide target, bool weighted) {
    find_bin(target, weighted);
    const uint32_t first_bin = shared_.bin;
    // Of ranks, the bits from `shift` on are known to be those of `prefix`.
    int shift = 64;
    Wide prefix = 0;
    while (shared_.bin_count > kList) {
      const Wide before = shared_.before;
      const int next = shift > kBinBits ? shift - kBinBits : 0;
      __syncthreads();
      clear_histogram();
      for (int id = threadIdx.x; id < vocab_; id += kThreads) {
        const float x = logits_[id];
        const uint32_t weight = weight_of(x);
        if (!keeps(x, id, weight) || bin_of(x, id) != first_bin) continue;
        const Wide rank = rank_of(x, id);
        if (!matches(rank, prefix, shift)) continue;
        const Wide digit = rank >> next & ((1ull << (shift - next)) - 1);
        add(kBins - 1 - static_cast<uint32_t>(digit), weight);
      }
      __syncthreads();
      find_bin(target - before, weighted);
      prefix = prefix << (shift - next) | (kBins - 1 - shared_.bin);
      shift = next;
      __syncthreads();
      if (threadIdx.x == 0) shared_.before += before;
      __syncthreads();
    }
    if (threadIdx.x == 0) shared_.list_size = 0;
    __syncthreads();
    for (int id = threadIdx.x; id < vocab_; id += kThreads) {
      const float x = logits_[id];
      const uint32_t weight = weight_of(x);
      if (!keeps(x, id, weight) || bin_of(x, id) != first_bin) continue;
      const Wide rank = rank_of(x, id);
      if (!matches(rank, prefix, shift)) continue;
      const uint32_t at = atomicAdd(&shared_.list_size, 1u);
      shared_.list_rank[at] = rank;
      shared_.list_weight[at] = weight;
    }
    __syncthreads();
    const uint32_t size = shared_.list_size;
    for (uint32_t mine = threadIdx.x; mine < size; mine += kThreads) {
      const Wide rank = shared_.list_rank[mine];
      const Wide step = weighted ? shared_.list_weight[mine] : 1;
      Wide ahead = shared_.before;
      for (uint32_t other = 0; other < size; ++other)
        if (shared_.list_rank[other] > rank) ahead += weighted ? shared_.list_weight[other] : 1;
      if (ahead <= target && target < ahead + step) {
        shared_.rank = rank;
        shared_.weight_found = shared_.list_weight[mine];
      }
    }
    __syncthreads();
  }

 private:
  QN_DEV uint32_t weight_of(float x) const {
    return static_cast<uint32_t>(exp2_approx((x - largest_) * scale_) * kUnit);
  }

  QN_DEV Wide rank_of(float x, int id) const {
    return static_cast<Wide>(by_id_ ? 0 : order_of(x)) << 32 | (0xffffffffu - id);
  }

  QN_DEV bool keeps(float x, int id, uint32_t weight) const {
    return rank_of(x, id) >= cut_ && weight >= min_weight_;
  }

  /// Never larger for a higher rank.
  QN_DEV uint32_t bin_of(float x, int id) const {
    if (by_id_) return id / 128;
    const float distance = (largest_ - x) * scale_ * 64.0f;
    return static_cast<uint32_t>(fminf(distance, kBins - 1));
  }

  QN_DEV static bool matches(Wide rank, Wide prefix, int shift) {
    return shift == 64 || rank >> shift == prefix;
  }

  QN_DEV void clear_histogram() {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads)
      shared_.weight[bin] = 0, shared_.count[bin] = 0;
    __syncthreads();
  }

  QN_DEV void add(uint32_t bin, uint32_t weight) {
    atomicAdd(&shared_.weight[bin], static_cast<Wide>(weight));
    atomicAdd(&shared_.count[bin], 1u);
  }

  QN_DEV Wide block_sum(Wide value) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
      value += __shfl_xor_sync(kAllLanes, value, lanes);
    if (threadIdx.x % kWarp == 0) shared_.warp_sum[threadIdx.x / kWarp] = value;
    __syncthreads();
    Wide total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared_.warp_sum[warp];
    __syncthreads();
    return total;
  }

  /// The bin in which the running sum over bins passes `target`; two bins per thread.
  QN_DEV void find_bin(Wide target, bool weighted) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, bin = threadIdx.x * 2;
    const Wide first = weighted ? shared_.weight[bin] : shared_.count[bin];
    const Wide second = weighted ? shared_.weight[bin + 1] : shared_.count[bin + 1];
    Wide sum = first + second;
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const Wide below = __shfl_up_sync(kAllLanes, sum, lanes);
      sum += lane >= lanes ? below : 0;
    }
    if (lane == kWarp - 1) shared_.warp_sum[warp] = sum;
    __syncthreads();
    Wide before = sum - first - second;
    for (int other = 0; other < warp; ++other) before += shared_.warp_sum[other];
    const bool in_first = before <= target && target < before + first;
    const bool in_second = before + first <= target && target < before + first + second;
    if (in_first || in_second) {
      shared_.bin = bin + in_second;
      shared_.bin_count = shared_.count[bin + in_second];
      shared_.before = in_second ? before + first : before;
    }
    __syncthreads();
  }

  Shared& shared_;
  const float* logits_;
  const int vocab_;
  int likeliest_;
  float largest_, scale_;
  bool by_id_;
  Wide cut_;
  uint32_t min_weight_;
};

QN_DEV float to_float(Wide value) {
  return static_cast<float>(static_cast<uint32_t>(value >> 32)) * 4294967296.0f +
         static_cast<float>(static_cast<uint32_t>(value));
}

__global__ __launch_bounds__(kThreads) void sampling_kernel(SampleArgs args) {
  Shared& shared = shared_as<Shared>();
  Row row(args, shared);
  const int64_t index = blockIdx.x;
  const float temperature = args.temperature[index], top_p = args.top_p[index];
  const float min_p = args.min_p[index];
  const int top_k = args.top_k[index];
  const bool cuts_k = top_k > 0 && top_k < args.vocab;

  const bool possible = row.find_largest();
  if (!possible || temperature == 0.0f) {
    if (threadIdx.x == 0) {
      args.token[index] = possible ? row.likeliest() : -1;
      if (args.logprob != nullptr) args.logprob[index] = 0.0f;
    }
    return;
  }
  constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;
  row.start(kLog2E / temperature, !cuts_k && top_p >= 1.0f && min_p <= 0.0f);
  Wide total = row.fill_histogram();
  if (cuts_k) {
    row.find(top_k - 1, false);
    row.cut_below(shared.rank & ~0xffffffffull);  // with all equals
    total = row.fill_histogram();
  }
  if (top_p < 1.0f) {
    const Wide share = static_cast<uint32_t>(top_p * 4294967296.0f);
    const Wide target = multiply_high(total, share << 32);
    row.find(target, true);
    row.cut_below(shared.rank);
  }
  if (min_p > 0.0f) row.require_weight(static_cast<uint32_t>(min_p * kUnit));
  if (top_p < 1.0f || min_p > 0.0f) total = row.fill_histogram();
  row.find(multiply_high(total, random_bits(args.seed[index], args.index[index])), true);
  if (threadIdx.x == 0) {
    args.token[index] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(shared.rank));
    if (args.logprob != nullptr)
      args.logprob[index] =
          (log2_approx(static_cast<float>(shared.weight_found)) - log2_approx(to_float(total))) *
          kLn2;
  }
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_sampling(const qn::cuda::SampleArgs* args, void* stream) {
  using namespace qn::cuda;
  if (args->rows == 0) return 0;
  return launch("sampling", sampling_kernel, dim3(args->rows), dim3(kThreads), sizeof(Shared),
                static_cast<cudaStream_t>(stream), *args);
}
