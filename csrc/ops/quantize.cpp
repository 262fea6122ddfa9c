#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "ops/check.h"
#include "ops/ops.h"

namespace qn::ops {
namespace {

constexpr std::array kFormatNames = {"f32",          "bf16",           "int8",
                                     "int8_grouped", "int4_symmetric", "int4"};
constexpr std::array kSourceNames = {"F32",  "F16",  "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
                                     "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"};
static_assert(kSourceNames.size() == std::size(kSourceBlocks));

constexpr int64_t kNoRow = std::numeric_limits<int64_t>::max();
constexpr float kLargestHalf = 65504.0f;
constexpr int64_t kRowsPerChunk = 8;

/// No shape that a file could claim overflows a size computed below this.
constexpr int64_t kMostElements = int64_t{1} << 48;

template <typename Names>
std::string join_names(const Names& names) {
  std::string text;
  for (const char* name : names) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

void check_shape(const char* op, int64_t rows, int64_t cols) {
  QN_CHECK(rows >= 0 && cols >= 1, "[", op, "] shape is [", rows, ", ", cols,
           "], expected rows >= 0 and cols >= 1");
  QN_CHECK(cols < kMostElements && rows <= kMostElements / (cols + kGroupSize) - kPanelRows, "[",
           op, "] shape is [", rows, ", ", cols, "], expected fewer than 2^48 elements");
}

/// Greatest |weight| of a quantised format: what its scales can hold, and for Int8 and Int4, whose
/// scales are float32, what a search can square.
float largest_weight(WeightFormat format) {
  switch (format) {
    case WeightFormat::Int8Grouped:
      return 127 * kLargestHalf;
    case WeightFormat::Int4Symmetric:
      return 7 * kLargestHalf;
    default:
      return 0x1p60f;
  }
}

bool is_exact(SourceType source, WeightFormat format) {
  switch (source) {
    case SourceType::Q4_0:
      return format == WeightFormat::Int8Grouped || format == WeightFormat::Int4Symmetric;
    case SourceType::Q5_0:
    case SourceType::Q8_0:
      return format == WeightFormat::Int8Grouped;
    default:
      return false;
  }
}

DecodeSourceArgs decode_args(void* out, DType dtype, int64_t cols, SourceType source,
                             const void* data) {
  DecodeSourceArgs args{};
  args.out = out;
  args.data = data;
  args.cols = cols;
  args.out_stride = cols;
  args.source = source;
  args.dtype = dtype;
  return args;
}

void decode_all(void* out, DType dtype, int64_t rows, int64_t cols, SourceType source,
                const void* data, const ExecContext& context) {
  const DecodeSourceArgs args = decode_args(out, dtype, cols, source, data);
  const auto kernel = cpu::active_cpu_kernels().decode_source;
  context.pool.parallel_for(rows, kRowsPerChunk,
                            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
}

[[noreturn]] void fail_row(int64_t row, WeightFormat format, int64_t cols, SourceType source,
                           const void* data) {
  std::vector<float> values(static_cast<size_t>(cols));
  const auto* first = static_cast<const char*>(data) + row * source_row_bytes(source, cols);
  cpu::active_cpu_kernels().decode_source(
      decode_args(values.data(), DType::F32, cols, source, first), 0, 1);
  const float limit = largest_weight(format);
  int64_t col = 0;
  while (col + 1 < cols && std::fabs(values[static_cast<size_t>(col)]) <= limit) ++col;
  const float value = values[static_cast<size_t>(col)];
  const std::string place = join_message("[pack_weight] weight at row ", row, ", column ", col,
                                         " is ", value, ", expected ");
  if (!std::isfinite(value)) throw ArgumentError(place + "a finite number");
  throw ArgumentError(
      join_message(place, "at most ", limit, " in magnitude for ", weight_format_name(format)));
}

/// First rejected row per thread.
class Rejections {
 public:
  explicit Rejections(int threads) : rows_(static_cast<size_t>(threads), kNoRow) {}
  int64_t* of(int thread) { return &rows_[static_cast<size_t>(thread)]; }
  int64_t first() const { return *std::min_element(rows_.begin(), rows_.end()); }

 private:
  std::vector<int64_t> rows_;
};

int64_t repack_all(void* out, WeightFormat format, int64_t rows, int64_t cols, SourceType source,
                   const void* data, const ExecContext& context) {
  Rejections rejections(context.pool.threads());
  const auto kernel = cpu::active_cpu_kernels().repack;
  context.pool.parallel_for(panel_count(rows), 1, [&](int64_t begin, int64_t end, int thread) {
    kernel(RepackArgs{out, data, rows, cols, source, format, rejections.of(thread)}, begin, end);
  });
  return rejections.first();
}

/// Panel by panel: 32 rows decoded into a scratch that stays in the cache, then packed.
int64_t quantize_all(void* out, WeightFormat format, int64_t rows, int64_t cols, SourceType source,
                     const void* data, const ExecContext& context) {
  const cpu::CpuKernels& kernels = cpu::active_cpu_kernels();
  const int threads = context.pool.threads();
  const int64_t scratch_floats = 2 * group_count(cols) * kPanelRows;
  const int64_t thread_floats = kPanelRows * cols + scratch_floats;
  const Workspace::Scope scope(context.workspace);
  float* scratch = context.workspace.allocate_array<float>(threads * thread_floats);
  Rejections rejections(threads);
  context.pool.parallel_for(panel_count(rows), 1, [&](int64_t begin, int64_t end, int thread) {
    float* decoded = scratch + thread * thread_floats;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first_row = panel * kPanelRows;
      const int64_t live = std::min(rows - first_row, kPanelRows);
      const auto* source_rows =
          static_cast<const char*>(data) + first_row * source_row_bytes(source, cols);
      kernels.decode_source(decode_args(decoded, DType::F32, cols, source, source_rows), 0, live);
      int64_t rejected = kNoRow;
      QuantizeArgs args{};
      args.out = static_cast<char*>(out) + panel * panel_bytes(format, cols);
      args.x = decoded;
      args.rows = live;
      args.cols = cols;
      args.x_stride = cols;
      args.format = format;
      args.scratch = decoded + kPanelRows * cols;
      args.largest = largest_weight(format);
      args.rejected = &rejected;
      kernels.quantize(args, 0, 1);
      if (rejected != kNoRow) {
        *rejections.of(thread) = std::min(*rejections.of(thread), first_row + rejected);
      }
    }
  });
  return rejections.first();
}

}  // namespace

const char* weight_format_name(WeightFormat format) {
  return kFormatNames[static_cast<size_t>(format)];
}

WeightFormat weight_format_from_name(std::string_view name) {
  const auto found = std::find(kFormatNames.begin(), kFormatNames.end(), name);
  QN_CHECK(found != kFormatNames.end(), "[weight] format is '", name, "', expected one of ",
           join_names(kFormatNames));
  return static_cast<WeightFormat>(found - kFormatNames.begin());
}

const char* source_type_name(SourceType source) {
  return kSourceNames[static_cast<size_t>(source)];
}

SourceType source_type_from_name(std::string_view name) {
  const auto found = std::find(kSourceNames.begin(), kSourceNames.end(), name);
  QN_CHECK(found != kSourceNames.end(), "[source] type is '", name, "', expected one of ",
           join_names(kSourceNames));
  return static_cast<SourceType>(found - kSourceNames.begin());
}

size_t weight_bytes(WeightFormat format, int64_t rows, int64_t cols) {
  check_shape("weight_bytes", rows, cols);
  if (!is_quantized(format)) {
    return static_cast<size_t>(rows * cols) * (format == WeightFormat::F32 ? 4 : 2);
  }
  return static_cast<size_t>(panel_count(rows) * panel_bytes(format, cols));
}

size_t source_bytes(SourceType source, int64_t rows, int64_t cols) {
  check_shape("source_bytes", rows, cols);
  const int64_t block = source_block(source).elements;
  QN_CHECK(cols % block == 0, "[source_bytes] ", source_type_name(source), " rows have ", cols,
           " columns, expected a multiple of the block of ", block);
  return static_cast<size_t>(rows * source_row_bytes(source, cols));
}

void pack_weight(void* out, WeightFormat format, int64_t rows, int64_t cols, SourceType source,
                 const void* data, const ExecContext& context) {
  source_bytes(source, rows, cols);
  if (!is_quantized(format)) {
    const DType dtype = format == WeightFormat::F32 ? DType::F32 : DType::BF16;
    decode_all(out, dtype, rows, cols, source, data, context);
    return;
  }
  const auto pack = is_exact(source, format) ? repack_all : quantize_all;
  const int64_t rejected = pack(out, format, rows, cols, source, data, context);
  if (rejected != kNoRow) fail_row(rejected, format, cols, source, data);
}

void decode_source(float* out, int64_t rows, int64_t cols, SourceType source, const void* data,
                   const ExecContext& context) {
  source_bytes(source, rows, cols);
  decode_all(out, DType::F32, rows, cols, source, data, context);
}

void unpack_weight(float* out, const WeightView& weight, const ExecContext& context) {
  check_shape("unpack_weight", weight.rows, weight.cols);
  QN_CHECK(weight.rows <= std::numeric_limits<int32_t>::max(), "[unpack_weight] weight has ",
           weight.rows, " rows, expected fewer than 2^31");
  const Workspace::Scope scope(context.workspace);
  int32_t* ids = context.workspace.allocate_array<int32_t>(weight.rows);
  std::iota(ids, ids + weight.rows, 0);
  gather(TensorView(out, DType::F32, {weight.rows, weight.cols}),
         TensorView(ids, DType::I32, {weight.rows}), weight, context);
}

}  // namespace qn::ops
