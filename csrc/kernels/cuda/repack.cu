// A weight as the CPU's kernels read it (quant_layout.h) rearranged for the GEMMs (gemm_layout.h),
// once, when it is loaded. Codes stay what they are; Int8's scale per row is rounded to half.
//
//   block    one tile of 64 rows x 64 columns
//   thread   words of the result, neighbouring ones at a time: a word's codes lie in two words of
//            the source, eight rows of which are a sector
//   bytes    reads the source once (a sector serves four threads), writes the result once
//   shared   none
//   roofline far from any limit that matters: the copy to the device takes longer
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm_layout.h"
#include "kernels/cuda/kernels.h"

namespace qn::cuda {
namespace {

constexpr int kThreads = 128;

/// quant_layout.h's numbers for one weight.
struct Layout {
  int64_t panels, panel_bytes;
  int64_t blocks;  // of a panel
  int32_t header_bytes, block_bytes, scale_bytes;
  int32_t group;      // columns of a block
  int32_t word_cols;  // columns in one word of codes
  uint32_t flip;      // makes signed codes unsigned
};

Layout layout_of(const RepackTilesArgs& args) {
  const bool by_row = args.format == WeightFormat::Int8;
  return Layout{panel_count(args.rows),
                panel_bytes(args.format, args.cols),
                block_count(args.format, args.cols),
                static_cast<int32_t>(header_bytes(args.format)),
                static_cast<int32_t>(block_bytes(args.format)),
                static_cast<int32_t>(by_row ? 0 : kScaleBytes),
                static_cast<int32_t>(by_row ? kInt8GroupSize : kGroupSize),
                args.format == WeightFormat::Int4Symmetric ? 8 : 4,
                by_row ? 0x80808080u : 0u};
}

/// One row of the source; rows behind the last have no blocks.
struct SourceRow {
  const char* panel;
  int row;  // of the panel
  int64_t blocks;

  QN_DEV SourceRow(const RepackTilesArgs& args, const Layout& layout, int64_t index) {
    const int64_t which = index / kPanelRows;
    panel = static_cast<const char*>(args.source) + which * layout.panel_bytes;
    row = static_cast<int>(index % kPanelRows);
    blocks = which < layout.panels ? layout.blocks : 0;
  }

  QN_DEV const char* block(const Layout& layout, int64_t index) const {
    return panel + layout.header_bytes + index * layout.block_bytes;
  }

  /// The word that has a column's code.
  QN_DEV uint32_t word(const Layout& layout, int64_t col) const {
    const int64_t index = col / layout.group;
    if (index >= blocks) return layout.word_cols == 8 ? 0x88888888u : 0x80808080u;  // value 0
    constexpr int kRows = kHalfPanelRows;
    const int word = static_cast<int>(col % layout.group) / layout.word_cols;
    const int at = (row / kRows * (layout.group / layout.word_cols) + word) * kRows + row % kRows;
    const char* codes = block(layout, index) + layout.scale_bytes;
    return reinterpret_cast<const uint32_t*>(codes)[at] ^ layout.flip;
  }
};

__global__ __launch_bounds__(kThreads) void repack_kernel(RepackTilesArgs args, Layout layout) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kPackedTile;
  const int64_t first_col = static_cast<int64_t>(blockIdx.x) * kPackedTile;
  const bool wide = layout.word_cols == 4;  // 8 bits
  const int words = wide ? 4 : 2;           // of a lane of an n-tile
  const int64_t tile = (args.first_row + first_row) / kPackedTile * gridDim.x + blockIdx.x;
  uint32_t* codes =
      static_cast<uint32_t*>(args.codes) + tile * (packed_tile_bytes(wide ? 8 : 4) / 4);
#pragma unroll 1
  for (int i = threadIdx.x; i < kPackedTile / 8 * kWarp * words; i += kThreads) {
    const int lane = i / words % kWarp, t = lane % 4, which = i % words;
    const int row = i / words / kWarp * 8 + lane / 4;
    const SourceRow source(args, layout, first_row + row);
    uint32_t word = 0;
    if (wide) {
      const int64_t col = first_col + 16 * which + 2 * t;
      const int shift = 16 * (t % 2);
      const uint32_t low = source.word(layout, col) >> shift & 0xffffu;
      const uint32_t high = source.word(layout, col + 8) >> shift & 0xffffu;
      word = low | high << 16;
    } else {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int64_t col = first_col + 16 * (2 * which + step) + 8 * pair;
          const uint32_t two = source.word(layout, col) >> (16 * (t % 2) + 4 * (t / 2));
          const int nibble = 2 * step + pair;
          word |= (two & 15u) << 4 * nibble | (two >> 8 & 15u) << 4 * (nibble + 4);
        }
      }
    }
    codes[i] = word;
  }

  const int row = threadIdx.x % kPackedTile;
  const int64_t padded_rows = packed_tiles(args.total_rows) * kPackedTile;
  const int64_t at = args.first_row + first_row + row;
  const SourceRow source(args, layout, first_row + row);
  const bool by_row = layout.scale_bytes == 0;
  const int64_t group = (by_row ? 1 : 2) * blockIdx.x + threadIdx.x / kPackedTile;
  if (group >= (by_row ? 1 : layout.blocks)) return;
  uint16_t scale = 0;
  if (source.blocks > 0) {
    scale = by_row ? static_cast<uint16_t>(
                         pack_f16(reinterpret_cast<const float*>(source.panel)[source.row], 0.0f))
                   : reinterpret_cast<const uint16_t*>(source.block(layout, group))[source.row];
  }
  static_cast<uint16_t*>(args.scales)[group * padded_rows + at] = scale;
}

}  // namespace
}  // namespace qn::cuda

extern "C" int qn_cuda_repack(const qn::cuda::RepackTilesArgs* args, void* stream) {
  using namespace qn::cuda;
  if (args->rows == 0 || args->cols == 0) return 0;
  return launch("repack", repack_kernel, dim3(packed_tiles(args->cols), packed_tiles(args->rows)),
                dim3(kThreads), 0, static_cast<cudaStream_t>(stream), *args, layout_of(*args));
}
