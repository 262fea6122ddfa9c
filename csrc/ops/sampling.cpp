#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/ops.h"

namespace qn::ops {
namespace {

static_assert(kVocabBlock == kReduceBlock);

constexpr int64_t kBlocksAtOnce = 128;  // partial results kept on the stack
constexpr int64_t kBlocksPerChunk = 128;

int64_t block_count(int64_t n) { return (n + kReduceBlock - 1) / kReduceBlock; }

void check_row(const char* op, const TensorView& x) {
  QN_CHECK(x.rank == 1 && x.dtype == DType::F32 && x.contiguous() && x.shape[0] > 0, "[", op,
           "] x is ", x.describe(), ", expected f32[n], dense and not empty");
}

/// Calls visit(block, partial) for all blocks in order.
template <typename Kernel, typename Visit>
void for_each_block(BlockReduceArgs args, Kernel kernel, Visit visit) {
  float partial[kBlocksAtOnce];
  const int64_t blocks = block_count(args.n);
  const float* x = args.x;
  const int64_t n = args.n;
  args.out = partial;
  for (int64_t first = 0; first < blocks; first += kBlocksAtOnce) {
    const int64_t count = std::min(kBlocksAtOnce, blocks - first);
    args.x = x + first * kReduceBlock;
    args.n = std::min(n - first * kReduceBlock, count * kReduceBlock);
    kernel(args, 0, count);
    for (int64_t i = 0; i < count; ++i) visit(first + i, partial[i]);
  }
}

bool has_nan(const float* x, int64_t n) {
  return std::any_of(x, x + n, [](float value) { return std::isnan(value); });
}

float largest_number(const float* x, int64_t n) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

void reduce_blocks(const char* op, const TensorView& out, const TensorView& x, float shift,
                   float scale, void (*kernel)(const BlockReduceArgs&, int64_t, int64_t),
                   const ExecContext& context) {
  check_row(op, x);
  const int64_t blocks = block_count(x.shape[0]);
  QN_CHECK(out.rank == 1 && out.dtype == DType::F32 && out.contiguous() && out.shape[0] == blocks,
           "[", op, "] out is ", out.describe(), ", expected f32[", blocks, "]");
  const BlockReduceArgs args{out.as<float>(), x.as<float>(), x.shape[0], shift, scale};
  context.pool.parallel_for(blocks, kBlocksPerChunk,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
}

}  // namespace

int64_t argmax(const TensorView& x, const ExecContext&) {
  check_row("argmax", x);
  const float* values = x.as<float>();
  const int64_t n = x.shape[0];
  float largest = -std::numeric_limits<float>::infinity();
  int64_t best_block = 0;
  for_each_block({nullptr, values, n, 0, 0}, cpu::active_cpu_kernels().block_max,
                 [&](int64_t block, float value) {
                   if (std::isnan(value)) {
                     const int64_t first = block * kReduceBlock;
                     value = largest_number(values + first, std::min(n - first, kReduceBlock));
                   }
                   if (value > largest) {
                     largest = value;
                     best_block = block;
                   }
                 });
  const float* found = std::find(values + best_block * kReduceBlock, values + n, largest);
  if (found == values + n) QN_FAIL("[argmax] x has nothing but NaN, expected at least one number");
  return found - values;
}

float log_sum_exp(const TensorView& x, const ExecContext&) {
  check_row("log_sum_exp", x);
  const float* values = x.as<float>();
  const int64_t n = x.shape[0];
  BlockReduceArgs args{nullptr, values, n, -std::numeric_limits<float>::infinity(), 1.0f};
  for_each_block(args, cpu::active_cpu_kernels().block_max,
                 [&](int64_t, float value) { args.shift = std::max(args.shift, value); });
  if (std::isinf(args.shift))
    return has_nan(values, n) ? std::numeric_limits<float>::quiet_NaN() : args.shift;
  double sum = 0;
  for_each_block(args, cpu::active_cpu_kernels().block_exp_sum,
                 [&](int64_t, float value) { sum += value; });
  return static_cast<float>(static_cast<double>(args.shift) + std::log(sum));
}

void block_max(const TensorView& out, const TensorView& x, const ExecContext& context) {
  reduce_blocks("block_max", out, x, 0, 0, cpu::active_cpu_kernels().block_max, context);
}

void block_exp_sum(const TensorView& out, const TensorView& x, float shift, float scale,
                   const ExecContext& context) {
  reduce_blocks("block_exp_sum", out, x, shift, scale, cpu::active_cpu_kernels().block_exp_sum,
                context);
}

}  // namespace qn::ops
