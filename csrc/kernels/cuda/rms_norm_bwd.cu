// Gradients of RMSNorm, with n = 1 / sqrt(mean(x^2) + eps) and g = dy * weight:
//
//   dx = n * (g - x * n^2 * mean(g * x)) + residual_grad
//   dweight = sum over the rows of dy * x * n
//
//   block     kNormBlock rows, one after the other (all 8 warps have one, cols up to 8192), or 8 at
//             a time (a warp has one, cols up to 256: the norms of QK-norm). A row stays in
//             registers between its sums and dx; so does the block's share of dweight, which then
//             goes to `partial`. A second kernel adds the shares up, in a fixed order: no atomics,
//             the same bits on every run
//   bytes     bf16: reads 4 and writes 2 per element, with residual_grad 2 more, the shares of
//             dweight 8 / kNormBlock = 0.25; about 20 float operations
//   shared    wide rows 128 bytes, narrow rows 8 KB
//   registers at most 128: two blocks per multiprocessor
//   roofline  16 bytes per access where rows are aligned: 96 % of the bandwidth of global memory
//             (A100 and H100 alike) from about 64 rows per multiprocessor on; fewer leave
//             multiprocessors idle
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kNarrowCols = 256;

/// RowWarps: warps that have a row together, 1 or 8.
template <int RowWarps>
union Shared {
  float sums[2][kWarps][2];  // of rows with even and odd numbers
};
template <>
union Shared<1> {
  float dweight[kWarps][kNarrowCols];
};

template <int N>
QN_DEV void load_weight(float (&out)[N], const RmsNormBwdArgs& args, int64_t index, bool aligned) {
  if (args.weight_dtype == DType::BF16)
    load_some(out, static_cast<const bf16*>(args.weight), index, args.cols, aligned);
  else
    load_some(out, static_cast<const float*>(args.weight), index, args.cols, aligned);
}

/// Columns: how many of a row a thread has.
template <typename T, int RowWarps, int Columns>
__global__ __launch_bounds__(kThreads, 2) void rms_norm_bwd_kernel(RmsNormBwdArgs args,
                                                                   bool aligned) {
  constexpr int kSize = kVector<T>, kVectors = Columns / kSize, kRowThreads = RowWarps * kWarp;
  constexpr int kRowsAtOnce = kWarps / RowWarps;
  Shared<RowWarps>& shared = shared_as<Shared<RowWarps>>();
  const int warp = threadIdx.x / kWarp;
  const int first_column = threadIdx.x % kRowThreads * kSize;
  const int64_t cols = args.cols, begin = static_cast<int64_t>(blockIdx.x) * kNormBlock;
  const int64_t end = begin + kNormBlock < args.rows ? begin + kNormBlock : args.rows;
  float dweight[kVectors][kSize] = {};
  int parity = 0;
  for (int64_t row = begin + threadIdx.x / kRowThreads; row < end; row += kRowsAtOnce) {
    const T* x_row = static_cast<const T*>(args.x) + row * args.x_stride;
    const T* dy_row = static_cast<const T*>(args.dy) + row * args.dy_stride;
    float x[kVectors][kSize], dy[kVectors][kSize];
    float squares = 0.0f, products = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int index = first_column + v * kRowThreads * kSize;
      float weight[kSize];
      load_some(x[v], x_row, index, cols, aligned);
      load_some(dy[v], dy_row, index, cols, aligned);
      load_weight(weight, args, index, aligned);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        squares = fmaf(x[v][j], x[v][j], squares);
        products = fmaf(dy[v][j] * weight[j], x[v][j], products);
      }
    }
    squares = lane_sum(squares);
    products = lane_sum(products);
    if constexpr (RowWarps > 1) {
      if (threadIdx.x % kWarp == 0) {
        shared.sums[parity][warp][0] = squares;
        shared.sums[parity][warp][1] = products;
      }
      __syncthreads();
      squares = products = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        squares += shared.sums[parity][i][0];
        products += shared.sums[parity][i][1];
      }
      parity ^= 1;
    }
    const float count = static_cast<float>(cols);
    const float norm = 1.0f / sqrtf(squares / count + args.eps);
    const float slope = -norm * norm * norm * (products / count);
    T* dx_row = static_cast<T*>(args.dx) + row * args.dx_stride;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int index = first_column + v * kRowThreads * kSize;
      if (index >= cols) break;
      float weight[kSize], dx[kSize];
      load_weight(weight, args, index, aligned);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        dweight[v][j] = fmaf(dy[v][j], x[v][j] * norm, dweight[v][j]);
        dx[j] = fmaf(dy[v][j] * weight[j], norm, x[v][j] * slope);
      }
      if (args.residual_grad != nullptr) {
        float residual[kSize];
        const T* from = static_cast<const T*>(args.residual_grad) + row * args.residual_stride;
        load_some(residual, from, index, cols, aligned);
#pragma unroll
        for (int j = 0; j < kSize; ++j) dx[j] += residual[j];
      }
      store_some(dx_row, index, cols, aligned, dx);
    }
  }

  float* partial = args.partial + blockIdx.x * cols;
  if constexpr (RowWarps > 1) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int part = 0; part < kSize; part += 4) {
        const int index = first_column + v * kRowThreads * kSize + part;
        const float (&some)[kSize] = dweight[v];
        store_some(partial, index, cols, cols % 4 == 0,
                   {some[part], some[part + 1], some[part + 2], some[part + 3]});
      }
  } else {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int part = 0; part < kSize; part += 4) {
        const float (&some)[kSize] = dweight[v];
        store(&shared.dweight[warp][first_column + v * kRowThreads * kSize + part],
              {some[part], some[part + 1], some[part + 2], some[part + 3]});
      }
    __syncthreads();
    if (threadIdx.x >= cols) return;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += shared.dweight[i][threadIdx.x];
    partial[threadIdx.x] = sum;
  }
}

struct SharesOfWeight {
  float sum[kWarps][kWarp];
};

/// 32 columns per block; a warp sums every eighth share.
__global__ __launch_bounds__(kThreads) void rms_norm_bwd_weight_kernel(RmsNormBwdArgs args) {
  SharesOfWeight& shared = shared_as<SharesOfWeight>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int64_t blocks = divide_up(args.rows, kNormBlock);
  float sum = 0.0f;
  if (column < args.cols) {
#pragma unroll 8
    for (int64_t block = warp; block < blocks; block += kWarps)
      sum += args.partial[block * args.cols + column];
  }
  shared.sum[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= args.cols) return;
#pragma unroll
  for (int i = 1; i < kWarps; ++i) sum += shared.sum[i][lane];
  if (args.weight_dtype == DType::BF16)
    store1(static_cast<bf16*>(args.dweight) + column, sum);
  else
    store1(static_cast<float*>(args.dweight) + column, sum);
}

template <typename T, int RowWarps, int Columns>
int launch_rows(const RmsNormBwdArgs& args, bool aligned, cudaStream_t stream) {
  return launch("rms_norm_bwd", rms_norm_bwd_kernel<T, RowWarps, Columns>,
                dim3(static_cast<unsigned>(divide_up(args.rows, kNormBlock))), dim3(kThreads),
                sizeof(Shared<RowWarps>), stream, args, aligned);
}

template <typename T>
int run_rows(const RmsNormBwdArgs& args, cudaStream_t stream) {
  const bool aligned =
      rows_are_aligned(static_cast<const T*>(args.dx), args.dx_stride) &&
      rows_are_aligned(static_cast<const T*>(args.dy), args.dy_stride) &&
      rows_are_aligned(static_cast<const T*>(args.x), args.x_stride) &&
      rows_are_aligned(static_cast<const T*>(args.residual_grad), args.residual_stride) &&
      rows_are_aligned(static_cast<const float*>(args.weight), 0);
  if (args.cols <= kNarrowCols)
    return launch_rows<T, 1, kNarrowCols / kWarp>(args, aligned, stream);
  if (args.cols <= 8 * kThreads) return launch_rows<T, kWarps, 8>(args, aligned, stream);
  return launch_rows<T, kWarps, 32>(args, aligned, stream);
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_rms_norm_bwd(const qn::RmsNormBwdArgs* args, void* stream) {
  using namespace qn::cuda;
  if (args->cols == 0) return 0;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (args->rows > 0) {
    const int error = args->dtype == qn::DType::F32 ? run_rows<float>(*args, queue)
                                                    : run_rows<qn::bf16>(*args, queue);
    if (error != 0) return error;
  }
  return launch("rms_norm_bwd_weight", rms_norm_bwd_weight_kernel,
                dim3(static_cast<unsigned>(divide_up(args->cols, kWarp))), dim3(kThreads),
                sizeof(SharesOfWeight), queue, *args);
}
