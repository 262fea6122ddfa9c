// out (+)= A B + bias of bf16 matrices on AMX tiles, either operand possibly stored transposed: the
// three products of a linear layer in training (forward, gradient of the input, gradient of the
// weight).
//
//   unit of work: `columns` columns of a block of up to kMatmulRowsInOnePass rows of A
//   A is packed beforehand for all units, [32 rows][32 of k][2 tiles]; a unit packs its own part of
//   B, [32 columns][32 of k][2 tiles], in passes of kMatmulDepth, so that 32 x 1024 of A and
//   1024 x 512 of B stay in L2, and multiplies 2 x 2 tiles
//   accumulation: float32 in ascending order of k, stored exactly between passes; one rounding
//   levels: amx only
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/vec.h"

#if QN_ISA_LEVEL >= 3
#include "kernels/cpu/amx_tile.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int64_t kTile = 512;          // bf16 of a tile of A or B
constexpr int64_t kSums = 4 * 16 * 16;  // floats of 32 x 32 sums, tile by tile
constexpr int64_t kFetchedAhead = 256;  // words along a row that is packed
constexpr int64_t kBlocksPackedTogether = 16;

/// Tiles along the depth; one of zeros where there is none.
int64_t steps_of(const MatmulArgs& a) { return a.depth > 0 ? (a.depth + 31) / 32 : 1; }

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/// A matrix of bf16; elements beyond rows and cols read as zeros.
struct Matrix {
  const bf16* data;
  int64_t stride, rows, cols;
};

__mmask32 first_words(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1u; }

/// 16 rows of 32 words.
QN_INLINE void copy_rows(bf16* tile, const Matrix& m, int64_t row, int64_t col) {
  const __mmask32 mask = first_words(m.cols - col);
  for (int r = 0; r < 16; ++r) {
    const bf16* source = m.data + (row + r) * m.stride + col;
    const __m512i words = _mm512_maskz_loadu_epi16(row + r < m.rows ? mask : 0, source);
    _mm512_storeu_si512(tile + 32 * r, words);
  }
}

/// 16 pairs of rows of 16 words, interleaved.
QN_INLINE void interleave_rows(bf16* tile, const Matrix& m, int64_t row, int64_t col) {
  const __mmask16 mask = static_cast<__mmask16>(first_words(least(m.cols - col, 16)));
  for (int r = 0; r < 32; r += 2) {
    const bf16* source = m.data + (row + r) * m.stride + col;
    const __m256i even = _mm256_maskz_loadu_epi16(row + r < m.rows ? mask : 0, source);
    const __m256i odd =
        _mm256_maskz_loadu_epi16(row + r + 1 < m.rows ? mask : 0, source + m.stride);
    const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                          _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    _mm512_storeu_si512(tile + 16 * r, pairs);
  }
}

QN_INLINE void transpose_dwords(bf16* tile, const bf16* source) {
  __m512 rows[16];
  transpose16(reinterpret_cast<const float*>(source), rows);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) _mm512_storeu_ps(reinterpret_cast<float*>(tile + 32 * r), rows[r]);
}

/// Fetches 32 cache lines, `stride` words apart, which are packed some steps later: rows of a wide
/// matrix are too many streams for the hardware's prefetchers.
QN_INLINE void fetch_lines(const bf16* data, int64_t offset, int64_t stride) {
  const char* line = reinterpret_cast<const char*>(data) + 2 * offset;
  for (int r = 0; r < 32; ++r, line += 2 * stride) _mm_prefetch(line, _MM_HINT_T0);
}

/// Two tiles of A: 16 rows x 32 of k each, one below the other.
void pack_a_tiles(const MatmulArgs& a, int64_t row, int64_t k, bf16* tiles) {
  if (!a.a_transposed) {
    const Matrix rows{a.a, a.a_stride, a.m, a.k};
    fetch_lines(a.a, row * a.a_stride + k + kFetchedAhead, a.a_stride);
    copy_rows(tiles, rows, row, k);
    copy_rows(tiles + kTile, rows, row + 16, k);
    return;
  }
  const Matrix rows{a.a, a.a_stride, a.k, a.m};
  fetch_lines(a.a, (k + 32) * a.a_stride + row, a.a_stride);
  alignas(64) bf16 pairs[kTile];
  for (int64_t half = 0; half < 2; ++half) {
    interleave_rows(pairs, rows, k, row + 16 * half);
    transpose_dwords(tiles + kTile * half, pairs);
  }
}

/// Two tiles of B: 16 pairs of k x 16 columns each, side by side.
void pack_b_tiles(const MatmulArgs& a, int64_t k, int64_t column, bf16* tiles) {
  if (!a.b_transposed) {
    const Matrix rows{a.b, a.b_stride, a.k, a.n};
    fetch_lines(a.b, (k + 32) * a.b_stride + column, a.b_stride);
    interleave_rows(tiles, rows, k, column);
    interleave_rows(tiles + kTile, rows, k, column + 16);
    return;
  }
  const Matrix rows{a.b, a.b_stride, a.n, a.k};
  fetch_lines(a.b, column * a.b_stride + k + kFetchedAhead, a.b_stride);
  alignas(64) bf16 words[kTile];
  for (int64_t half = 0; half < 2; ++half) {
    copy_rows(words, rows, column + 16 * half, k);
    transpose_dwords(tiles + kTile * half, words);
  }
}

/// `steps` tile pairs for each of `panels` panels of B: along the rows of the stored matrix.
void pack_b(const MatmulArgs& a, int64_t k, int64_t steps, int64_t column, int64_t panels,
            bf16* packed) {
  const auto pack = [&](int64_t panel, int64_t step) {
    pack_b_tiles(a, k + step * 32, column + panel * 32,
                 packed + (panel * steps + step) * 2 * kTile);
  };
  if (a.b_transposed) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t step = 0; step < steps; ++step) pack(panel, step);
    }
  } else {
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t panel = 0; panel < panels; ++panel) pack(panel, step);
    }
  }
}

QN_INLINE void load_sums(const float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + 256, 64);
  _tile_loadd(2, sums + 512, 64);
  _tile_loadd(3, sums + 768, 64);
}

QN_INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

/// Fetches a tile into the nearest cache.
QN_INLINE void fetch_tile(const bf16* tile) {
  const auto* lines = reinterpret_cast<const char*>(tile);
  for (int line = 0; line < 16; ++line) _mm_prefetch(lines + 64 * line, _MM_HINT_T0);
}

/// Cache lines that are needed soon, `each_step` of them fetched beside every step of a product.
struct ComingLines {
  const char* at;
  int64_t stride, each_step;

  QN_INLINE void fetch() {
    for (int64_t line = 0; line < each_step; ++line, at += stride) _mm_prefetch(at, _MM_HINT_T1);
  }
};

ComingLines coming_lines(const void* first, int64_t stride, int64_t lines, int64_t steps) {
  return {static_cast<const char*>(first), stride, (lines + steps - 1) / steps};
}

/// 32 x 32 sums (+)= a b.
///
/// The order of `multiply_tiles`, with the next step's tiles fetched between the products: beside
/// busy neighbours a tile that comes from L2 otherwise holds up its product (25 to 20 and 50 to 34
/// ns for each, by the kind of neighbour; 12 to 13 alone).
QN_INLINE void multiply(const bf16* a, const bf16* b, int64_t steps, const float* before,
                        float* after, ComingLines next_a, ComingLines next_sums, ComingLines out) {
  if (before != nullptr) {
    load_sums(before);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, a += 2 * kTile, b += 2 * kTile) {
    _tile_loadd(4, a, 64);
    fetch_tile(a + 2 * kTile);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    fetch_tile(b + 2 * kTile);
    _tile_loadd(4, a + kTile, 64);
    _tile_dpbf16ps(2, 4, 6);
    fetch_tile(a + 3 * kTile);
    _tile_loadd(6, b + kTile, 64);
    _tile_dpbf16ps(3, 4, 6);
    fetch_tile(b + 3 * kTile);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(1, 4, 6);
    next_a.fetch();
    next_sums.fetch();
    out.fetch();
  }
  store_sums(after);
}

int64_t size_of(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

void* out_at(const MatmulArgs& a, int64_t row, int64_t column) {
  return static_cast<char*>(a.out) + (row * a.out_stride + column) * size_of(a.dtype);
}

/// Rounds 32 x 32 sums to out, a row of 32 at a time.
void write_out(const MatmulArgs& a, const float* sums, int64_t row, int64_t column) {
  const int low = static_cast<int>(least(a.n - column, 16));
  const int high = static_cast<int>(least(a.n - column - low, 16));
  Vec bias[2] = {Vec::zero(), Vec::zero()};
  if (a.bias != nullptr) {
    bias[0] = Vec::load(a.bias + column, low);
    bias[1] = Vec::load(a.bias + column + low, high);
  }
  const auto write_rows = [&]<class T>(T* out) {
    for (int64_t r = 0; r < 32 && row + r < a.m; ++r, out += a.out_stride) {
      const float* from = sums + r / 16 * 512 + r % 16 * 16;
      Vec left = Vec::load(from) + bias[0], right = Vec::load(from + 256) + bias[1];
      if (a.add) {
        left = left + Vec::load(out, low);
        right = right + Vec::load(out + low, high);
      }
      left.store(out, low);
      right.store(out + low, high);
    }
  };
  if (a.dtype == DType::F32) {
    write_rows(static_cast<float*>(out_at(a, row, column)));
  } else {
    write_rows(static_cast<bf16*>(out_at(a, row, column)));
  }
}

void multiply_unit(const MatmulArgs& a, int64_t unit, void* scratch) {
  const int64_t first_column = unit * a.columns;
  const int64_t panels = (least(a.columns, a.n - first_column) + 31) / 32;
  const int64_t row_blocks = (a.rows + 31) / 32, all_steps = steps_of(a);
  bf16* const packed_b = static_cast<bf16*>(scratch);
  float* const block = reinterpret_cast<float*>(packed_b + kMatmulDepth * a.columns);
  float* sums = block + kSums;
  const bool continues = a.first_depth > 0, finishes = a.first_depth + a.depth >= a.k;
  if (a.partial != nullptr) sums = a.partial + unit * row_blocks * (a.columns / 32) * kSums;
  const int64_t passes = (all_steps * 32 + kMatmulDepth - 1) / kMatmulDepth;
  const int64_t pass_steps = (all_steps + passes - 1) / passes;
  for (int64_t first = 0; first < all_steps; first += pass_steps) {
    const int64_t steps = least(pass_steps, all_steps - first);
    pack_b(a, a.first_depth + first * 32, steps, first_column, panels, packed_b);
    const bool last = first + steps == all_steps;
    const bool starts = first == 0 && !continues, ends = last && finishes;
    for (int64_t rows = 0; rows < row_blocks; ++rows) {
      const bf16* packed = a.packed_a + (rows * all_steps + first) * 2 * kTile;
      const bf16* next = packed + all_steps * 2 * kTile;
      for (int64_t panel = 0; panel < panels; ++panel) {
        float* const own = sums + (rows * panels + panel) * kSums;
        const int64_t row = a.first_row + rows * 32, column = first_column + panel * 32;
        const int64_t share = rows + 1 < row_blocks ? steps * 32 / panels : 0;
        multiply(packed, packed_b + panel * steps * 2 * kTile, steps, starts ? nullptr : own,
                 ends ? block : own, coming_lines(next + panel * share * 32, 64, share, steps),
                 coming_lines(own + kSums, 64, starts ? 0 : kSums / 16, steps),
                 coming_lines(out_at(a, row, column), a.out_stride * size_of(a.dtype),
                              ends ? 32 : 0, steps));
        if (ends) write_out(a, block, row, column);
      }
    }
  }
}

}  // namespace

void matmul_pack(const MatmulArgs& args, int64_t begin, int64_t end) {
  const int64_t steps = steps_of(args);
  const auto pack = [&](int64_t block, int64_t step) {
    pack_a_tiles(args, args.first_row + block * 32, args.first_depth + step * 32,
                 args.packed_a + (block * steps + step) * 2 * kTile);
  };
  if (!args.a_transposed) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t step = 0; step < steps; ++step) pack(block, step);
    }
    return;
  }
  // A part of each stored row at a time, wide enough to be read at the memory's speed.
  for (int64_t first = begin; first < end; first += kBlocksPackedTogether) {
    const int64_t last = least(first + kBlocksPackedTogether, end);
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t block = first; block < last; ++block) pack(block, step);
    }
  }
}

void matmul(const MatmulArgs& args, int64_t begin, int64_t end, void* scratch) {
  const TileScope tiles;
  for (int64_t unit = begin; unit < end; ++unit) multiply_unit(args, unit, scratch);
}

}  // namespace qn::cpu::QN_ISA
#endif
