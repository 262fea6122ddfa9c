#include "core/error.h"
#include "kernels/cuda/device.h"

namespace qn::cuda {

bool is_built() { return false; }

int device_count() {
  QN_FAIL("[cuda] this library was built without CUDA; build it with QN_CMAKE_ARGS=-DQN_CUDA=ON");
}

}  // namespace qn::cuda
