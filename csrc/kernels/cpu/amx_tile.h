// AMX tile configuration as a scope. Level amx only.
//
//   tiles 0-3   C: up to 16 rows x 16 dwords        tiles 4-5   A: up to 16 rows x 64 bytes
//                                                   tiles 6-7   B: 16 rows x 64 bytes
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace qn::cpu::QN_ISA {

/// The 64-byte operand of ldtilecfg (Intel SDM, "LDTILECFG").
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

/// Configures this thread's tiles for the lifetime of the scope. Every kernel run opens its own:
/// tiles fault without a configuration, and other libraries on the same thread may have left
/// theirs.
class TileScope {
 public:
  /// All tiles 16 rows x 64 bytes, but A (4, 5) and C (0-3) with `a_rows` rows.
  explicit __attribute__((always_inline)) TileScope(int a_rows = 16) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(tile < 6 ? a_rows : 16);
    }
    load(config);
  }
  explicit __attribute__((always_inline)) TileScope(const TileConfig& config) { load(config); }
  __attribute__((always_inline)) ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  static __attribute__((always_inline)) void load(const TileConfig& config) {
    // gcc 12 declares only 8 bytes of the operand as read and would drop the stores to the rest.
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
};

}  // namespace qn::cpu::QN_ISA
