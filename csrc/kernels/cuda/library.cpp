#include "kernels/cuda/library.h"

namespace qn::cuda {

Device::Device(const std::string& library) : Gpu(library) {
#define QN_CUDA_LOAD(name) \
  launchers_.name = reinterpret_cast<decltype(launchers_.name)>(symbol("qn_cuda_" #name));
  QN_CUDA_LAUNCHERS(QN_CUDA_LOAD)
#undef QN_CUDA_LOAD
  device_info_.multiprocessors = info().multiprocessors;
}

}  // namespace qn::cuda
