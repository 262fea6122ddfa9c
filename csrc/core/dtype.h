// Element types of tensors. Plain enums and storage structs only: ISA objects include this file.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace qn {

enum class DType : uint8_t { F32, BF16, I32, I8 };

/// Storage of one bfloat16: the upper half of a float32. Arithmetic happens in float32.
struct bf16 {
  uint16_t bits;
};

constexpr size_t dtype_size(DType dtype) {
  return dtype == DType::BF16 ? 2 : dtype == DType::I8 ? 1 : 4;
}

constexpr const char* dtype_name(DType dtype) {
  return dtype == DType::F32    ? "f32"
         : dtype == DType::BF16 ? "bf16"
         : dtype == DType::I32  ? "i32"
                                : "int8";
}

}  // namespace qn
