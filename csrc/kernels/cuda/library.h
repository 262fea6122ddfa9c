// The kernels' launchers, taken from the library that the GPU was opened with.
#pragma once
#include <memory>
#include <string>

#include "core/gpu.h"
#include "kernels/cuda/kernels.h"

// clang-format off
#define QN_CUDA_LAUNCHERS(X)                                                                 \
  X(rope) X(attention_prefill) X(attention_decode) X(attention_decode_workspace) X(rms_norm) \
  X(sampling) X(swiglu) X(gemm_bf16) X(gemm_int8) X(gemm_int4) X(gemm_plan)                  \
  X(gemm_workspace) X(gather) X(repack) X(rms_norm_bwd) X(rope_pairs) X(swiglu_bwd) X(adamw)  \
  X(softmax_xent) X(packed_attention) X(packed_attention_bwd) X(gemm_input_grad)             \
  X(gemm_weight_grad) X(gemm_w8a8) X(quantize_tokens) X(linear_xent) X(linear_xent_workspace)
// clang-format on

namespace qn::cuda {

struct Launchers {
#define QN_CUDA_MEMBER(name) decltype(&::qn_cuda_##name) name;
  QN_CUDA_LAUNCHERS(QN_CUDA_MEMBER)
#undef QN_CUDA_MEMBER
};

/// A GPU with the kernels that run on it.
class Device : public Gpu {
 public:
  explicit Device(const std::string& library);

  const Launchers& launchers() const { return launchers_; }
  const DeviceInfo& device_info() const { return device_info_; }

 private:
  Launchers launchers_{};
  DeviceInfo device_info_{};
};

}  // namespace qn::cuda
