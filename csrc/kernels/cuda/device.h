// The CUDA half as the rest of the library sees it; no_cuda.cpp stands in when it is not built.
#pragma once

namespace qn::cuda {

/// Whether this library contains CUDA kernels.
bool is_built();

/// CUDA devices of this machine; throws Error when the library was built without CUDA.
int device_count();

}  // namespace qn::cuda
