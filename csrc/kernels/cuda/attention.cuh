// What prefill and decode attention share: 16 query rows of a warp against blocks of 16 keys.
//
// A row is one head of one token; the heads that share a kv head are rows of the same tile, so keys
// and values are read once for all of them. S = Q K^T and O += P V are m16n8k16 mma in bf16 with
// float32 sums; the softmax is online (running maximum and sum per row, in powers of two).
//
// Shared-memory rows are padded by 16 bytes, which puts the eight rows that one ldmatrix (bf16) or
// one load of four bytes per lane (int8) touches into different banks; for_chunks does so for the
// eight lanes that a copy of 16 bytes each serves at a time.
#pragma once
#include "kernels/cuda/kv_pages.cuh"

namespace qn::cuda {

constexpr int kBlockKeys = 16;
constexpr int kRowTile = 16;  // query rows of a warp
constexpr float kLog2E = 1.44269504088896340736f;

template <int HeadDim, int Keys>
struct Bf16Tile {
  bf16 keys[Keys][HeadDim + 8];
  bf16 values[Keys][HeadDim + 8];
};

template <int HeadDim, int Keys>
struct Int8Tile {
  uint8_t keys[Keys][HeadDim + 16];
  uint8_t values[Keys][HeadDim + 16];
  struct {
    float key[kBlockKeys], value[kBlockKeys];
  } scales[Keys / kBlockKeys];
};

/// Calls copy(row, chunk) for every chunk of 16 bytes of Rows rows, a thread's share. Eight threads
/// beside each other have 128 bytes of a row, or of what is left of a row 64 or 32 bytes, and that
/// of so many rows, so far apart, that they meet no bank twice: neither where rows are an odd
/// number of chunks apart, nor with load_neighbour where these are floats.
template <int Rows, int Chunks, int Threads, bool Unrolled = true, int First = 0, class Copy>
QN_DEV void for_chunks(int thread, const Copy& copy) {
  if constexpr (First < Chunks) {
    constexpr int kLeft = Chunks - First, kWidth = kLeft >= 8 ? 8 : kLeft >= 4 ? 4 : 2;
    static_assert(kLeft % 2 == 0 && Rows % 8 == 0);
    [[maybe_unused]] constexpr int kUnroll = Unrolled ? (Rows * kWidth + Threads - 1) / Threads : 1;
#pragma unroll kUnroll
    for (int index = thread; index < Rows * kWidth; index += Threads) {
      const int group = index / 8, place = index % 8;
      copy(group / kWidth * 8 + group % kWidth + place / kWidth * kWidth, First + place % kWidth);
    }
    for_chunks<Rows, Chunks, Threads, Unrolled, First + kWidth>(thread, copy);
  }
}

/// Four signed bytes as two bf16 pairs, exactly: 2^23 + (byte ^ 128) as a float, less its offset.
QN_DEV void widen4(uint32_t (&pairs)[2], uint32_t bytes) {
  bytes ^= 0x80808080u;
  uint32_t wide[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    wide[i] =
        __float_as_uint(bits_to_float(byte_permute(bytes, 0x4b000000u, 0x7440 + i)) - 8388736.0f);
  pairs[0] = byte_permute(wide[0], wide[1], 0x7632);
  pairs[1] = byte_permute(wide[2], wide[3], 0x7632);
}

/// bf16 cache: fragments by ldmatrix, in their natural order.
template <int HeadDim_>
struct Bf16Cache {
  static constexpr int HeadDim = HeadDim_, kStoredDim = HeadDim_;
  static constexpr int kRowChunks = HeadDim / 8;  // of 16 bytes, of a stored key
  static constexpr int kValueDims = 16;           // of one value_fragments
  static constexpr bool kScaled = false;
  template <int Keys>
  using Tile = Bf16Tile<HeadDim, Keys>;

  QN_DEV static void query_fragment(uint32_t (&a)[4], const bf16 (*q)[HeadDim + 8], int lane,
                                    int step) {
    ldmatrix_x4(a, &q[lane % 16][step * 16 + lane / 16 * 8]);
  }

  /// B registers of two n-tiles: keys `row` .. row + 15, dims 16 step .. 16 step + 15.
  template <int Keys>
  QN_DEV static void key_fragments(uint32_t (&b)[2][2], const Tile<Keys>& tile, int row, int lane,
                                   int step) {
    uint32_t r[4];
    ldmatrix_x4(r, &tile.keys[row + lane % 8 + lane / 16 * 8][step * 16 + lane / 8 % 2 * 8]);
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
  }

  template <int Keys>
  QN_DEV static void value_fragments(uint32_t (&b)[2][2], const Tile<Keys>& tile, int row, int lane,
                                     int part) {
    uint32_t r[4];
    ldmatrix_x4_trans(r, &tile.values[row + lane % 16][part * 16 + lane / 16 * 8]);
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
  }

  /// Puts a row's results in order: `out` is its row of floats.
  QN_DEV static void store_row(float* out, const float (&o)[HeadDim / 8][4], int row_half, int lane,
                               float factor) {
#pragma unroll
    for (int j = 0; j < HeadDim / 8; ++j)
      st8(out + j * 8 + lane % 4 * 2, uint2{__float_as_uint(o[j][row_half * 2] * factor),
                                            __float_as_uint(o[j][row_half * 2 + 1] * factor)});
  }
};

/// int8 cache. The sum over dims may run in any order: of every 16, lane l % 4 has the four dims
/// that are one word of a key, and q's fragments follow. For P V a lane reads words of four dims
/// from its four keys; dim 4 c + i of every 32 is column c of n-tile i. So the tile has whole 32
/// dims, zeros from StoredDim on.
template <int StoredDim>
struct Int8Cache {
  static constexpr int HeadDim = (StoredDim + 31) / 32 * 32, kStoredDim = StoredDim;
  static constexpr int kRowChunks = StoredDim / 16;
  static constexpr int kValueDims = 32;
  static constexpr bool kScaled = true;
  template <int Keys>
  using Tile = Int8Tile<HeadDim, Keys>;

  QN_DEV static void query_fragment(uint32_t (&a)[4], const bf16 (*q)[HeadDim + 8], int lane,
                                    int step) {
    const uint2 top = ld8(&q[lane / 4][step * 16 + lane % 4 * 4]);
    const uint2 bottom = ld8(&q[lane / 4 + 8][step * 16 + lane % 4 * 4]);
    a[0] = top.x, a[1] = bottom.x, a[2] = top.y, a[3] = bottom.y;
  }

  template <int Keys>
  QN_DEV static void key_fragments(uint32_t (&b)[2][2], const Tile<Keys>& tile, int row, int lane,
                                   int step) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
      widen4(b[j], word(&tile.keys[row + j * 8 + lane / 4][step * 16 + lane % 4 * 4]));
  }

  template <int Keys>
  QN_DEV static void value_fragments(uint32_t (&b)[4][2], const Tile<Keys>& tile, int row, int lane,
                                     int part) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int key = row + lane % 4 * 2 + e * 8, dim = part * 32 + lane / 4 * 4;
      uint32_t low[2], high[2];
      widen4(low, word(&tile.values[key][dim]));
      widen4(high, word(&tile.values[key + 1][dim]));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        b[i][e] = byte_permute(low[i / 2], high[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
    }
  }

  QN_DEV static void store_row(float* out, const float (&o)[HeadDim / 8][4], int row_half, int lane,
                               float factor) {
    const int flip = lane / 4 % 2;  // every other row stores its second column first: other banks
#pragma unroll
    for (int part = 0; part < HeadDim / 32; ++part)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&pair)[4] = o[part * 4 + i];
          v[i] = (e == flip ? pair[row_half * 2] : pair[row_half * 2 + 1]) * factor;
        }
        store(out + part * 32 + (lane % 4 * 2 + (e ^ flip)) * 4, v);
      }
  }

 private:
  QN_DEV static uint32_t word(const uint8_t* p) { return *reinterpret_cast<const uint32_t*>(p); }
};

/// Starts the copies of 16 keys and values, `first` a multiple of 16, to rows `row`.. of the tile;
/// keys from `limit` on become zeros, because 0 * NaN of a stale slot would not vanish.
template <class Cache, int Keys>
QN_DEV void fetch_block(typename Cache::template Tile<Keys>& tile, int row, const KvPages& kv,
                        const int32_t* page_table, int head, int first, int limit, int lane) {
  const int slot = first & ((1 << kv.page_shift) - 1);
  const int64_t page = first < limit ? page_table[first >> kv.page_shift] : 0;
  const KvHead from = kv_head(kv, page, head);
  const char* keys = from.keys + slot * kv_row_bytes(kv);
  constexpr int kTileChunks =
      Cache::kStoredDim == Cache::HeadDim ? Cache::kRowChunks : Cache::kRowChunks + 1;
  for_chunks<kBlockKeys, kTileChunks, kWarp>(lane, [&](int key, int chunk) {
    const bool exists = first + key < limit && chunk < Cache::kRowChunks;
    const char* p = exists ? keys + (key * Cache::kRowChunks + chunk) * 16 : from.keys;
    cp_async16(reinterpret_cast<char*>(&tile.keys[row + key]) + chunk * 16, p, exists);
    cp_async16(reinterpret_cast<char*>(&tile.values[row + key]) + chunk * 16,
               exists ? p + from.value_offset : p, exists);
  });
  if constexpr (Cache::kScaled) {
    const int key = lane % kBlockKeys;
    const bool is_value = lane >= kBlockKeys, exists = first + key < limit;
    const int64_t offset =
        from.scale_offset + (slot + key) * 4 + (is_value ? 4 << kv.page_shift : 0);
    auto& scales = tile.scales[row / kBlockKeys];
    cp_async4(is_value ? &scales.value[key] : &scales.key[key],
              exists ? from.keys + offset : from.keys, exists);
  }
}

/// What one warp knows of its 16 rows; a lane has rows lane / 4 and lane / 4 + 8.
template <class Cache>
struct RowState {
  uint32_t q[Cache::HeadDim / 16][4];
  float out[Cache::HeadDim / 8][4];
  float max[2];  // in units of log2
  float sum[2];  // of this lane's columns

  QN_DEV void start(const bf16 (*rows)[Cache::HeadDim + 8], int lane) {
#pragma unroll
    for (int step = 0; step < Cache::HeadDim / 16; ++step)
      Cache::query_fragment(q[step], rows, lane, step);
#pragma unroll
    for (int j = 0; j < Cache::HeadDim / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] = 0.0f;
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  /// Adds the keys of rows row .. row + 16 Blocks - 1 of the tile. Row half p of the lane sees
  /// those of them from low[p] to high[p] - 1; `masked` false promises that this is all.
  template <int Blocks, int Keys>
  QN_DEV void attend(const typename Cache::template Tile<Keys>& tile, int row, float scale,
                     const int (&low)[2], const int (&high)[2], bool masked, int lane) {
    float s[Blocks * 2][4] = {};
#pragma unroll
    for (int block = 0; block < Blocks; ++block)
#pragma unroll
      for (int step = 0; step < Cache::HeadDim / 16; ++step) {
        uint32_t b[2][2];
        Cache::template key_fragments<Keys>(b, tile, row + block * 16, lane, step);
        mma_bf16(s[block * 2], q[step], b[0][0], b[0][1]);
        mma_bf16(s[block * 2 + 1], q[step], b[1][0], b[1][1]);
      }
    const int column = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < Blocks * 2; ++j) {
      float factor[2] = {scale, scale};
      if constexpr (Cache::kScaled) {
        const float* scales = tile.scales[row / kBlockKeys + j / 2].key;
        factor[0] *= scales[j % 2 * 8 + column];
        factor[1] *= scales[j % 2 * 8 + column + 1];
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] *= factor[e % 2];
    }
    if (masked) {
#pragma unroll
      for (int j = 0; j < Blocks * 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = j * 8 + column + e % 2;
          if (key < low[e / 2] || key >= high[e / 2]) s[j][e] = -INFINITY;
        }
    }
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      float largest = max[p];
#pragma unroll
      for (int j = 0; j < Blocks * 2; ++j)
        largest = fmaxf(largest, fmaxf(s[j][p * 2], s[j][p * 2 + 1]));
      largest = lane_max<4>(largest);
      const float shift = largest == -INFINITY ? 0.0f : largest;  // nothing seen yet
      const float fade = exp2_approx(max[p] - shift);
      max[p] = largest;
      sum[p] *= fade;
#pragma unroll
      for (int j = 0; j < Cache::HeadDim / 8; ++j) {
        out[j][p * 2] *= fade;
        out[j][p * 2 + 1] *= fade;
      }
#pragma unroll
      for (int j = 0; j < Blocks * 2; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          s[j][p * 2 + e] = exp2_approx(s[j][p * 2 + e] - shift);
          sum[p] += s[j][p * 2 + e];
        }
    }
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      if constexpr (Cache::kScaled) {
        const float* scales = tile.scales[row / kBlockKeys + block].value;
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[block * 2 + j][e] *= scales[j * 8 + column + e % 2];
      }
      const float (&left)[4] = s[block * 2];
      const float (&right)[4] = s[block * 2 + 1];
      const uint32_t a[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]),
                             pack_bf16(right[0], right[1]), pack_bf16(right[2], right[3])};
      constexpr int kTiles = Cache::kValueDims / 8;
#pragma unroll
      for (int part = 0; part < Cache::HeadDim / Cache::kValueDims; ++part) {
        uint32_t b[kTiles][2];
        Cache::template value_fragments<Keys>(b, tile, row + block * 16, lane, part);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) mma_bf16(out[part * kTiles + j], a, b[j][0], b[j][1]);
      }
    }
  }
};

/// Calls run<Cache>(...) for the cache's head_dim and element type.
template <template <class> class Run, class... Args>
int for_cache(const KvPages& kv, const Args&... args) {
  if (kv.bits == 8) {
    switch (kv.head_dim) {
      case 64:
        return Run<Int8Cache<64>>::run(args...);
      case 80:
        return Run<Int8Cache<80>>::run(args...);
      case 96:
        return Run<Int8Cache<96>>::run(args...);
      default:
        return Run<Int8Cache<128>>::run(args...);
    }
  }
  switch (kv.head_dim) {
    case 64:
      return Run<Bf16Cache<64>>::run(args...);
    case 80:
      return Run<Bf16Cache<80>>::run(args...);
    case 96:
      return Run<Bf16Cache<96>>::run(args...);
    default:
      return Run<Bf16Cache<128>>::run(args...);
  }
}

}  // namespace qn::cuda
