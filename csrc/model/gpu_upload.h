// Sends weights to a GPU while the host prepares the next ones.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/gpu.h"
#include "ops/gpu.h"

namespace qn::model {

/// Owns the device memory of what it has sent. Blocks of rows go through page-locked memory, two in
/// turn, so that one is filled while the other is copied and rearranged.
class GpuUpload {
 public:
  explicit GpuUpload(std::shared_ptr<const Gpu> gpu);
  ~GpuUpload();
  GpuUpload(const GpuUpload&) = delete;
  GpuUpload& operator=(const GpuUpload&) = delete;

  /// Writes rows [first_row, first_row + rows) in the layout of ops::pack_weight to `out`.
  using Fill = std::function<void(void* out, int64_t first_row, int64_t rows)>;

  /// The weight on the GPU; `fill` is called for all of its rows in order. Throws ArgumentError
  /// when the format or the shape is none that the GPU's kernels can use.
  WeightView matrix(const std::string& name, WeightFormat format, int64_t rows, int64_t cols,
                    const Fill& fill);
  /// The values on the GPU, as f32 or rounded to bf16.
  TensorView vector(const std::string& name, const float* values, int64_t size, DType dtype);
  /// Waits for the copies and frees the page-locked memory.
  void finish();

 private:
  struct Slot;
  Slot& next_slot(size_t bytes);
  void* allocate(const std::string& name, size_t bytes);

  std::shared_ptr<const Gpu> gpu_;
  std::vector<GpuBuffer> memory_;
  std::vector<std::unique_ptr<Slot>> slots_;
  size_t next_ = 0;
};

}  // namespace qn::model
