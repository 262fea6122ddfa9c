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

/// Tile of A: 16 rows x 32 of k.
void pack_a_tile(const MatmulArgs& a, int64_t row, int64_t k, bf16* tile) {
  if (!a.a_transposed) return copy_rows(tile, {a.a, a.a_stride, a.m, a.k}, row, k);
  alignas(64) bf16 pairs[kTile];
  interleave_rows(pairs, {a.a, a.a_stride, a.k, a.m}, k, row);
  transpose_dwords(tile, pairs);
}

/// Tile of B: 16 pairs of k x 16 columns.
void pack_b_tile(const MatmulArgs& a, int64_t k, int64_t column, bf16* tile) {
  if (!a.b_transposed) return interleave_rows(tile, {a.b, a.b_stride, a.k, a.n}, k, column);
  alignas(64) bf16 rows[kTile];
  copy_rows(rows, {a.b, a.b_stride, a.n, a.k}, column, k);
  transpose_dwords(tile, rows);
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

/// 32 x 32 sums (+)= a b; the steps also fetch `lines` cache lines each of `next`.
QN_INLINE void multiply(const bf16* a, const bf16* b, int64_t steps, const float* before,
                        float* after, const char* next, int64_t lines) {
  if (before != nullptr) {
    load_sums(before);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, a += 2 * kTile, b += 2 * kTile) {
    multiply_tiles<false, 2, 2>(a, a + kTile, 64, b, b + kTile, 64);
    for (int64_t line = 0; line < lines; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
  store_sums(after);
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
  const int64_t at = row * a.out_stride + column;
  if (a.dtype == DType::F32) {
    write_rows(static_cast<float*>(a.out) + at);
  } else {
    write_rows(static_cast<bf16*>(a.out) + at);
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
    for (int64_t panel = 0; panel < panels; ++panel) {
      bf16* tile = packed_b + panel * steps * 2 * kTile;
      for (int64_t step = 0; step < steps; ++step, tile += 2 * kTile) {
        const int64_t k = a.first_depth + (first + step) * 32;
        pack_b_tile(a, k, first_column + panel * 32, tile);
        pack_b_tile(a, k, first_column + panel * 32 + 16, tile + kTile);
      }
    }
    const bool last = first + steps == all_steps;
    for (int64_t rows = 0; rows < row_blocks; ++rows) {
      const bf16* packed = a.packed_a + (rows * all_steps + first) * 2 * kTile;
      const char* next = reinterpret_cast<const char*>(packed + all_steps * 2 * kTile);
      const int64_t lines = rows + 1 < row_blocks ? 32 / panels : 0;
      for (int64_t panel = 0; panel < panels; ++panel) {
        float* const own = sums + (rows * panels + panel) * kSums;
        const float* before = first > 0 || continues ? own : nullptr;
        float* after = last && finishes ? block : own;
        multiply(packed, packed_b + panel * steps * 2 * kTile, steps, before, after,
                 next + panel * steps * lines * 64, lines);
        if (last && finishes) {
          write_out(a, block, a.first_row + rows * 32, first_column + panel * 32);
        }
      }
    }
  }
}

}  // namespace

void matmul_pack(const MatmulArgs& args, int64_t begin, int64_t end) {
  const int64_t steps = steps_of(args);
  for (int64_t block = begin; block < end; ++block) {
    bf16* tile = args.packed_a + block * steps * 2 * kTile;
    for (int64_t step = 0; step < steps; ++step, tile += 2 * kTile) {
      const int64_t row = args.first_row + block * 32, k = args.first_depth + step * 32;
      pack_a_tile(args, row, k, tile);
      pack_a_tile(args, row + 16, k, tile + kTile);
    }
  }
}

void matmul(const MatmulArgs& args, int64_t begin, int64_t end, void* scratch) {
  const TileScope tiles;
  for (int64_t unit = begin; unit < end; ++unit) multiply_unit(args, unit, scratch);
}

}  // namespace qn::cpu::QN_ISA
#endif
