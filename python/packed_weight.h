// Weights packed for the engine, as objects of Python: the bytes and what they are.
#pragma once
#include <pybind11/pybind11.h>

#include "core/allocator.h"
#include "ops/ops.h"
#include "tensor_caster.h"

namespace qn::python {

/// Owns the bytes that `view` describes.
struct PackedWeight {
  HostBuffer buffer;
  WeightView view;

  PackedWeight(WeightFormat format, int64_t rows, int64_t cols)
      : buffer(ops::weight_bytes(format, rows, cols)),
        view{buffer.data(), format, rows, cols, cols} {}
};

/// A weight in a GPU's layout, in an array there that belongs to somebody else.
struct GpuWeight {
  PyDeviceTensor data;
  py::object array;
  WeightView view;
};

void register_weights(pybind11::module_& module);

}  // namespace qn::python
