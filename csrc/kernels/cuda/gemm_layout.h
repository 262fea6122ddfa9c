// Quantised weights as the GEMMs of this folder read them: in the order of an mma's B registers, so
// that a thread takes its share with one shared-memory load and no ldmatrix.
//
// A weight [rows, cols] is cut into tiles of 64 rows x 64 columns, padded with codes of value 0;
// tile (i, j) is number i * column_tiles + j. Inside a tile lie eight n-tiles of 8 rows, each 32
// lanes' words. Lane l of an n-tile has row l / 4 and, of every 16 columns s, the columns k(s, e) =
// 16 s + 2 (l % 4) + {0, 1, 8, 9}[e].
//
//   4 bits (2048 B)  uint32 [8 n-tiles][32 lanes][2]: word w has s = 2w and 2w + 1; element e of
//   step
//                    s is nibble (s % 2) * 2 + e / 2 + 4 * (e % 2), so that nibbles i and i + 4 are
//                    the halves of one register. value = scale * (code - zero), zero 8 without
//                    `zeros`
//   8 bits (4096 B)  uint32 [8 n-tiles][32 lanes][4]: word s, byte e. value = scale * (code - 128)
//
//   scales           half [groups][rows rounded up to 64], groups of group_size columns
//   zeros            uint8, the same shape
#pragma once
#include <stdint.h>

#include "kernels/scalar.h"

namespace qn::cuda {

constexpr int kPackedTile = 64;

QN_HD constexpr int64_t packed_tiles(int64_t n) { return (n + kPackedTile - 1) / kPackedTile; }
QN_HD constexpr int64_t packed_tile_bytes(int bits) { return kPackedTile * kPackedTile / 8 * bits; }

}  // namespace qn::cuda
