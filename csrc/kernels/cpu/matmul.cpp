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

#if QN_ISA_LEVEL >= 4
#include "kernels/cpu/amx_tile.h"

namespace qn::cpu::QN_ISA {
namespace {

constexpr int64_t kTile = 512;          // bf16 of a tile of A or B
constexpr int64_t kSums = 4 * 16 * 16;  // floats of 32 x 32 sums, tile by tile
constexpr int64_t kFetchedAhead = 256;  // words along a row that is packed
constexpr int64_t kBlocksPackedTogether = 16;

/// Tiles along the depth; one of zeros where there is none.
int64_t steps_of(const MatmulArgs& a) { return a.depth > 0 ? (a.depth + 31) / 32 : 1; }

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

/// A or B as it is stored, with k along one axis, the rows of A or columns of B ("outer") along the
/// other.
struct Operand {
  Matrix matrix;
  bool k_along_rows;
  bool is_a;

  /// Two tiles, 16 outer x 32 of k each: [outer][k] of A, [pairs of k][outer][2] of B.
  void pack(int64_t outer, int64_t k, bf16* tiles) const {
    const int64_t ahead =
        k_along_rows ? outer * matrix.stride + k + kFetchedAhead : (k + 32) * matrix.stride + outer;
    fetch_lines(matrix.data, ahead, matrix.stride);
    alignas(64) bf16 turned[kTile];
    const bool turns = is_a != k_along_rows;
    for (int64_t half = 0; half < 2; ++half, outer += 16, tiles += kTile) {
      bf16* const to = turns ? turned : tiles;
      k_along_rows ? copy_rows(to, matrix, outer, k) : interleave_rows(to, matrix, k, outer);
      if (turns) transpose_dwords(tiles, turned);
    }
  }

  /// `steps` of these for each of `blocks` blocks of 32 outer, [block][step], along the rows of the
  /// stored matrix: wide enough parts of each to be read at the memory's speed.
  void pack(int64_t first_outer, int64_t blocks, int64_t first_k, int64_t steps,
            bf16* packed) const {
    const int64_t together = k_along_rows ? 1 : kBlocksPackedTogether;
    for (int64_t begin = 0; begin < blocks; begin += together) {
      const int64_t end = least(begin + together, blocks);
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t block = begin; block < end; ++block) {
          pack(first_outer + block * 32, first_k + step * 32,
               packed + (block * steps + step) * 2 * kTile);
        }
      }
    }
  }
};

Operand operand_a(const MatmulArgs& a) {
  if (a.a_transposed) return {{a.a, a.a_stride, a.k, a.m}, false, true};
  return {{a.a, a.a_stride, a.m, a.k}, true, true};
}

Operand operand_b(const MatmulArgs& a) {
  if (a.b_transposed) return {{a.b, a.b_stride, a.n, a.k}, true, false};
  return {{a.b, a.b_stride, a.k, a.n}, false, false};
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
    operand_b(a).pack(first_column, panels, a.first_depth + first * 32, steps, packed_b);
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
  operand_a(args).pack(args.first_row + begin * 32, end - begin, args.first_depth, steps,
                       args.packed_a + begin * steps * 2 * kTile);
}

void matmul(const MatmulArgs& args, int64_t begin, int64_t end, void* scratch) {
  const TileScope tiles;
  for (int64_t unit = begin; unit < end; ++unit) multiply_unit(args, unit, scratch);
}

}  // namespace qn::cpu::QN_ISA
#endif
