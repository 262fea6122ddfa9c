// Rotary embedding in place, without a cache, and its gradient, the rotation by the negative angle:
// pairs (i, i + half) of every head: (a, b) -> (a cos - b sin, b cos + a sin). float32 inside, one
// rounding. (rope.cu fuses the rotation with what inference has around it.)
//
//   block    one token; a thread has one vector of the first half of a head and its partner half a
//            head on, of every n-th head, with the angles in registers
//   bytes    bf16: reads 2 and writes 2 per element, cos and sin (4 half each) once per token and,
//            from L1, once more per group of heads; 3 float operations per element
//   shared   none
//   roofline 16 bytes per access where rows are aligned and half is a multiple of the vector;
//            the bandwidth of global memory limits it (A100 and H100 alike)
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {
namespace {

constexpr int kThreads = 128;

/// Size elements by one access, or by one each.
template <int Size, typename T>
QN_DEV void load_elements(float (&out)[Size], const T* p) {
  if constexpr (Size == 1) {
    out[0] = load1(p);
  } else {
#pragma unroll
    for (int i = 0; i < Size; i += kVector<T>) {
      float v[kVector<T>];
      load(v, p + i);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) out[i + j] = v[j];
    }
  }
}

template <int Size, typename T>
QN_DEV void store_elements(T* p, const float (&v)[Size]) {
  if constexpr (Size == 1)
    store1(p, v[0]);
  else
    store(p, v);
}

template <typename T, int Size>
__global__ __launch_bounds__(kThreads) void rope_pairs_kernel(RopeArgs args, int lanes,
                                                              float direction) {
  const int64_t token = blockIdx.x;
  const int group = kThreads / lanes;  // heads at a time
  const int first_head = threadIdx.x / lanes;
  if (first_head >= group) return;
  T* x = static_cast<T*>(args.x) + token * args.token_stride;
  for (int64_t i = threadIdx.x % lanes * Size; i < args.half; i += lanes * Size) {
    float cos[Size], sin[Size];
    load_elements(cos, args.cos + token * args.cos_stride + i);
    load_elements(sin, args.sin + token * args.sin_stride + i);
#pragma unroll
    for (int j = 0; j < Size; ++j) sin[j] *= direction;
    for (int64_t head = first_head; head < args.heads; head += group) {
      T* first = x + head * args.head_stride + i;
      float a[Size], b[Size];
      load_elements(a, first);
      load_elements(b, first + args.half);
#pragma unroll
      for (int j = 0; j < Size; ++j) {
        const float left = a[j], right = b[j];
        a[j] = left * cos[j] - right * sin[j];
        b[j] = right * cos[j] + left * sin[j];
      }
      store_elements(first, a);
      store_elements(first + args.half, b);
    }
  }
}

template <typename T, int Size>
int launch_pairs(const RopeArgs& args, int64_t tokens, bool inverse, cudaStream_t stream) {
  const int64_t vectors = args.half / Size;
  const int lanes = static_cast<int>(vectors < kThreads ? vectors : kThreads);
  return launch("rope_pairs", rope_pairs_kernel<T, Size>, dim3(static_cast<unsigned>(tokens)),
                dim3(kThreads), 0, stream, args, lanes, inverse ? -1.0f : 1.0f);
}

template <typename T>
int run(const RopeArgs& args, int64_t tokens, bool inverse, cudaStream_t stream) {
  const bool aligned = args.half % kVector<T> == 0 &&
                       rows_are_aligned(static_cast<const T*>(args.x), args.token_stride) &&
                       rows_are_aligned(static_cast<const T*>(args.x), args.head_stride) &&
                       rows_are_aligned(args.cos, args.cos_stride) &&
                       rows_are_aligned(args.sin, args.sin_stride);
  return aligned ? launch_pairs<T, kVector<T>>(args, tokens, inverse, stream)
                 : launch_pairs<T, 1>(args, tokens, inverse, stream);
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_rope_pairs(const qn::RopeArgs* args, int64_t tokens, bool inverse,
                                  void* stream) {
  using namespace qn;
  if (tokens == 0 || args->heads == 0 || args->half == 0) return 0;
  return args->dtype == DType::F32
             ? cuda::run<float>(*args, tokens, inverse, static_cast<cudaStream_t>(stream))
             : cuda::run<bf16>(*args, tokens, inverse, static_cast<cudaStream_t>(stream));
}
