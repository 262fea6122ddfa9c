#include "model/gpu_upload.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace qn::model {
namespace {

constexpr size_t kSlotBytes = size_t{8} << 20;
constexpr int64_t kBlockRows = 64;  // whole tiles of the GPU's layout
constexpr int64_t kAlignedElements = 8;

bf16 round(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

}  // namespace

/// Page-locked memory and, for what is rearranged, device memory that it is copied to.
struct GpuUpload::Slot {
  explicit Slot(const Gpu& gpu) : done(gpu) {}
  PinnedBuffer host;
  GpuBuffer device;
  GpuEvent done;
};

GpuUpload::GpuUpload(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {
  for (int i = 0; i < 2; ++i) slots_.push_back(std::make_unique<Slot>(*gpu_));
}

GpuUpload::~GpuUpload() = default;

GpuUpload::Slot& GpuUpload::next_slot(size_t bytes) {
  Slot& slot = *slots_[next_++ % slots_.size()];
  slot.done.sync();
  const size_t held = slot.host.size();
  if (held < bytes) {
    slot.host = {};
    slot.device = {};
    slot.host = PinnedBuffer(*gpu_, std::max(bytes, std::min(2 * held, kSlotBytes)));
    slot.device = GpuBuffer(*gpu_, slot.host.size(), "memory for loading weights");
  }
  return slot;
}

void* GpuUpload::allocate(const std::string& name, size_t bytes) {
  memory_.emplace_back(*gpu_, bytes, ("tensor " + name).c_str());
  return memory_.back().data();
}

WeightView GpuUpload::matrix(const std::string& name, WeightFormat format, int64_t rows,
                             int64_t cols, const Fill& fill) {
  QN_CHECK(
      ops::gpu_has_format(format), "[model] tensor ", name, " is held as ",
      ops::weight_format_name(format),
      ", which no GPU kernel reads; expected weights auto, int4, int8 or bf16 of a checkpoint");
  QN_CHECK(cols % kAlignedElements == 0 && rows > 0, "[model] tensor ", name, " is [", rows, ", ",
           cols, "], expected a multiple of ", kAlignedElements, " columns on a GPU");
  const WeightView weight{allocate(name, ops::gpu_weight_bytes(format, rows, cols)), format, rows,
                          cols, cols};
  const int64_t unit = static_cast<int64_t>(ops::weight_bytes(format, kBlockRows, cols));
  const int64_t block = std::max<int64_t>(1, static_cast<int64_t>(kSlotBytes) / unit) * kBlockRows;
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t count = std::min(block, rows - first);
    const size_t bytes = ops::weight_bytes(format, count, cols);
    Slot& slot = next_slot(bytes);
    fill(slot.host.data(), first, count);
    if (is_quantized(format)) {
      gpu_->copy(slot.device.data(), slot.host.data(), bytes);
      ops::repack_weight(weight, first, count, slot.device.data(), *gpu_);
    } else {
      char* to = static_cast<char*>(const_cast<void*>(weight.data));
      gpu_->copy(to + ops::weight_bytes(format, first, cols), slot.host.data(), bytes);
    }
    slot.done.record();
  }
  return weight;
}

TensorView GpuUpload::vector(const std::string& name, const float* values, int64_t size,
                             DType dtype) {
  const size_t bytes = static_cast<size_t>(size) * dtype_size(dtype);
  const TensorView result(allocate(name, bytes), dtype, {size});
  Slot& slot = next_slot(bytes);
  if (dtype == DType::F32)
    std::memcpy(slot.host.data(), values, bytes);
  else
    std::transform(values, values + size, static_cast<bf16*>(slot.host.data()), round);
  gpu_->copy(result.data, slot.host.data(), bytes);
  slot.done.record();
  return result;
}

void GpuUpload::finish() {
  gpu_->sync();
  slots_.clear();
}

}  // namespace qn::model
