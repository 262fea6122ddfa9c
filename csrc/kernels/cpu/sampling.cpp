// Partial results over the logits of one token: the largest element, or the sum of exponentials, of
// every block of kReduceBlock elements. Blocks are fixed, so nothing built on them depends on the
// number of threads.
//
//   x [n] f32; out [ceil(n / 128)] f32
//   block_max: a block with NaN gives NaN
//   block_exp_sum: sum of exp((x - shift) * scale) in two Vecs of float32; NaN propagates
//   levels: all (Vec)
//   bytes per element: 4
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

namespace qn::cpu::QN_ISA {
namespace {

struct Block {
  const float* x;
  int64_t size;
};

QN_INLINE Block block_of(const BlockReduceArgs& args, int64_t index) {
  const int64_t first = index * kReduceBlock;
  const int64_t left = args.n - first;
  return {args.x + first, left < kReduceBlock ? left : kReduceBlock};
}

bool has_nan(const Block& block) {
  for (int64_t i = 0; i < block.size; ++i) {
    if (block.x[i] != block.x[i]) return true;
  }
  return false;
}

}  // namespace

void block_max(const BlockReduceArgs& args, int64_t begin, int64_t end) {
  const float lowest = -__builtin_inff();
  for (int64_t index = begin; index < end; ++index) {
    const Block block = block_of(args, index);
    Vec largest[2] = {Vec(lowest), Vec(lowest)};
    Vec doubt[2] = {Vec::zero(),
                    Vec::zero()};  // x - x is 0 but for NaN, which max() forgets, and inf
    int64_t i = 0;
    for (; i + 2 * Vec::kLanes <= block.size; i += 2 * Vec::kLanes) {
      for (int half = 0; half < 2; ++half) {
        const Vec x = Vec::load(block.x + i + half * Vec::kLanes);
        largest[half] = max(x, largest[half]);
        doubt[half] = doubt[half] + (x - x);
      }
    }
    float result = max(max(largest[0], largest[1]));
    float doubtful = sum(doubt[0] + doubt[1]);
    for (; i < block.size; ++i) {
      result = block.x[i] > result ? block.x[i] : result;
      doubtful += block.x[i] - block.x[i];
    }
    args.out[index] = doubtful != 0 && has_nan(block) ? __builtin_nanf("") : result;
  }
}

void block_exp_sum(const BlockReduceArgs& args, int64_t begin, int64_t end) {
  const Vec shift(args.shift), scale(args.scale);
  for (int64_t index = begin; index < end; ++index) {
    const Block block = block_of(args, index);
    Vec total[2] = {Vec::zero(), Vec::zero()};
    int64_t i = 0;
    for (; i + 2 * Vec::kLanes <= block.size; i += 2 * Vec::kLanes) {
      total[0] = total[0] + exp((Vec::load(block.x + i) - shift) * scale);
      total[1] = total[1] + exp((Vec::load(block.x + i + Vec::kLanes) - shift) * scale);
    }
    float rest[2 * Vec::kLanes];
    for (int lane = 0; lane < 2 * Vec::kLanes; ++lane) {
      rest[lane] = i + lane < block.size ? block.x[i + lane] : -__builtin_inff();
    }
    if (i < block.size) {
      total[0] = total[0] + exp((Vec::load(rest) - shift) * scale);
      total[1] = total[1] + exp((Vec::load(rest + Vec::kLanes) - shift) * scale);
    }
    args.out[index] = sum(total[0] + total[1]);
  }
}

}  // namespace qn::cpu::QN_ISA
