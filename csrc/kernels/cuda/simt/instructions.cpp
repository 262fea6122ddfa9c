// Instructions that involve a whole warp or several steps: shuffles, votes, reductions, ldmatrix,
// mma, cp.async. Fragment layouts: PTX ISA, "Warp-Level Matrix Instructions"; in the comments
// group = lane / 4 and pair = lane % 4 as there.
#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/cuda/simt/machine.h"
#include "kernels/scalar.h"

// The inner products are the bulk of a GEMM's time here. Their terms and sums are exact, so that
// wider instructions change no bit.
#define QN_SIMT_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))

namespace qn::simt {
namespace {

template <typename T>
T& at(void* const* arguments, int lane) {
  return *static_cast<T*>(arguments[lane]);
}

const Site& place() { return running().waiting_at; }

void require_full_warp(const char* name, uint32_t lanes) {
  if (lanes == ~0u) return;
  report("partial-warp", place(), "%s by lanes %#010x, expected all 32", name, lanes);
  give_up();
}

void shuffle(void* const* arguments, uint32_t lanes) {
  ++machine.counters.shuffles;
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    auto& mine = at<ShuffleArgument>(arguments, lane);
    if (lanes >> mine.source & 1) {
      mine.result = at<ShuffleArgument>(arguments, mine.source).value;
      continue;
    }
    report("shuffle-from-absent-lane", place(), "lane %d reads lane %d, which takes no part", lane,
           mine.source);
    mine.result = 0x7fc0dead;  // a NaN
  }
}

void ballot(void* const* arguments, uint32_t lanes) {
  uint32_t result = 0;
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    if (at<BallotArgument>(arguments, lane).predicate) result |= 1u << lane;
  }
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    at<BallotArgument>(arguments, __builtin_ctz(left)).result = result;
  }
}

uint32_t reduce_pair(const ReduceArgument& how, uint32_t a, uint32_t b) {
  const bool less = how.is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
  switch (how.reduction) {
    case Reduction::Add:
      return a + b;
    case Reduction::Min:
      return less ? a : b;
    case Reduction::Max:
      return less ? b : a;
    case Reduction::And:
      return a & b;
    case Reduction::Or:
      return a | b;
    case Reduction::Xor:
      return a ^ b;
  }
  return 0;
}

void reduce(void* const* arguments, uint32_t lanes) {
  const int first = __builtin_ctz(lanes);
  const auto& how = at<ReduceArgument>(arguments, first);
  uint32_t result = how.value;
  for (uint32_t left = lanes & (lanes - 1); left != 0; left &= left - 1) {
    result = reduce_pair(how, result, at<ReduceArgument>(arguments, __builtin_ctz(left)).value);
  }
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    at<ReduceArgument>(arguments, __builtin_ctz(left)).result = result;
  }
}

/// Lane 8 m + r gives the address of row r (8 elements of 16 bits) of matrix m. Register m of a
/// lane receives elements 2 pair and 2 pair + 1 of row `group` of matrix m, or, transposed, of
/// column `group`.
template <bool Trans>
void ldmatrix(void* const* arguments, uint32_t lanes) {
  require_full_warp("ldmatrix", lanes);
  const int matrices = at<LdmatrixArgument>(arguments, 0).matrices;
  ++machine.counters.ldmatrix;
  Thread* const me = current;
  uint16_t matrix[4][8][8];
  for (int m = 0; m < matrices; ++m) {
    std::array<int, 8> rows_in_banks = {};
    for (int row = 0; row < 8; ++row) {
      const int lane = m * 8 + row;
      const void* address = at<LdmatrixArgument>(arguments, lane).row;
      const size_t offset = shared_offset(address);
      current = &machine.fibers[me->warp * 32 + lane];  // who reads this row
      if (!is_shared(address)) {
        report("not-shared-memory", place(), "ldmatrix row at %p", address);
        give_up();
      }
      if (offset % 16 != 0) {
        report("misaligned-access", running().waiting_at,
               "ldmatrix row at shared offset %zu, expected a multiple of 16", offset);
        give_up();
      }
      if (machine.check) check_shared(offset, 16, Access::Read, running().waiting_at);
      current = me;
      ++rows_in_banks[offset / 16 % 8];
      memcpy(matrix[m][row], address, 16);
    }
    machine.counters.ldmatrix_wavefronts +=
        static_cast<uint64_t>(*std::max_element(rows_in_banks.begin(), rows_in_banks.end()));
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = lane % 4;
    for (int m = 0; m < matrices; ++m) {
      const uint32_t low = Trans ? matrix[m][2 * pair][group] : matrix[m][group][2 * pair];
      const uint32_t high = Trans ? matrix[m][2 * pair + 1][group] : matrix[m][group][2 * pair + 1];
      at<LdmatrixArgument>(arguments, lane).result[m] = low | high << 16;
    }
  }
}

/// d += a b for one 16x8 tile. Products of 11-bit significands are exact in double; so are the sums
/// as long as their terms' exponents lie within 30 of each other. One rounding at the end. (The
/// hardware aligns and truncates the terms; tests have tolerances.)
QN_SIMT_CLONES void multiply_tile(const double (&a)[16][16], const double (&b)[16][8],
                                  float (&d)[16][8]) {
  for (int i = 0; i < 16; ++i) {
    double sum[8] = {};
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) sum[n] += a[i][k] * b[k][n];
    }
    for (int n = 0; n < 8; ++n) d[i][n] = static_cast<float>(sum[n] + static_cast<double>(d[i][n]));
  }
}

/// m16n8k16. A: register r holds row group + 8 (r % 2), columns 2 pair + 8 (r / 2) and the next.
/// B: register r holds rows 2 pair + 8 r and the next, column group. D: element i is row
/// group + 8 (i / 2), column 2 pair + i % 2.
template <float (*Widen)(uint32_t)>
void mma_16_bit(void* const* arguments, uint32_t lanes) {
  require_full_warp("mma", lanes);
  ++machine.counters.mma;
  double a[16][16], b[16][8];
  float d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& argument = at<MmaArgument>(arguments, lane);
    const int group = lane / 4, pair = lane % 4;
    for (int r = 0; r < 4; ++r) {
      double* to = &a[group + r % 2 * 8][2 * pair + r / 2 * 8];
      to[0] = static_cast<double>(Widen(argument.a[r] & 0xffff));
      to[1] = static_cast<double>(Widen(argument.a[r] >> 16));
    }
    for (int r = 0; r < 2; ++r) {
      b[2 * pair + 8 * r][group] = static_cast<double>(Widen(argument.b[r] & 0xffff));
      b[2 * pair + 8 * r + 1][group] = static_cast<double>(Widen(argument.b[r] >> 16));
    }
    for (int i = 0; i < 4; ++i) {
      d[group + i / 2 * 8][2 * pair + i % 2] = static_cast<const float*>(argument.d)[i];
    }
  }
  multiply_tile(a, b, d);
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = lane % 4;
    for (int i = 0; i < 4; ++i) {
      static_cast<float*>(at<MmaArgument>(arguments, lane).d)[i] =
          d[group + i / 2 * 8][2 * pair + i % 2];
    }
  }
}

float widen_bf16(uint32_t bits) {
  return math::base::bf16_to_float(bf16{static_cast<uint16_t>(bits)});
}
float widen_f16(uint32_t bits) { return math::base::half_to_float(static_cast<uint16_t>(bits)); }

QN_SIMT_CLONES void multiply_tile_s8(const int32_t (&a)[16][32], const int32_t (&b)[32][8],
                                     uint32_t (&d)[16][8]) {
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 32; ++k) {
      for (int n = 0; n < 8; ++n) d[i][n] += static_cast<uint32_t>(a[i][k] * b[k][n]);
    }
  }
}

/// m16n8k32. A: register r holds row group + 8 (r % 2), columns 4 pair + 16 (r / 2) to + 3. B:
/// register r holds rows 4 pair + 16 r to + 3, column group. D as above.
void mma_s8(void* const* arguments, uint32_t lanes) {
  require_full_warp("mma", lanes);
  ++machine.counters.mma;
  int32_t a[16][32], b[32][8];
  uint32_t d[16][8];  // wraps around as the instruction does without .satfinite
  for (int lane = 0; lane < 32; ++lane) {
    const auto& argument = at<MmaArgument>(arguments, lane);
    const int group = lane / 4, pair = lane % 4;
    for (int byte = 0; byte < 4; ++byte) {
      for (int r = 0; r < 4; ++r) {
        a[group + r % 2 * 8][4 * pair + r / 2 * 16 + byte] =
            static_cast<int8_t>(argument.a[r] >> 8 * byte);
      }
      for (int r = 0; r < 2; ++r) {
        b[4 * pair + 16 * r + byte][group] = static_cast<int8_t>(argument.b[r] >> 8 * byte);
      }
    }
    for (int i = 0; i < 4; ++i) {
      memcpy(&d[group + i / 2 * 8][2 * pair + i % 2], static_cast<const int32_t*>(argument.d) + i,
             4);
    }
  }
  multiply_tile_s8(a, b, d);
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = lane % 4;
    auto* result = static_cast<int32_t*>(at<MmaArgument>(arguments, lane).d);
    for (int i = 0; i < 4; ++i) memcpy(result + i, &d[group + i / 2 * 8][2 * pair + i % 2], 4);
  }
}

}  // namespace

const Operation kShuffle = {"__shfl_sync", shuffle};
const Operation kBallot = {"a vote", ballot};
const Operation kReduce = {"__reduce_sync", reduce};
const Operation kLdmatrix = {"ldmatrix", ldmatrix<false>};
const Operation kLdmatrixTrans = {"ldmatrix.trans", ldmatrix<true>};
const Operation kMmaBf16 = {"mma.bf16", mma_16_bit<widen_bf16>};
const Operation kMmaF16 = {"mma.f16", mma_16_bit<widen_f16>};
const Operation kMmaS8 = {"mma.s8", mma_s8};

void cp_async(void* destination, const void* source, int bytes, int source_bytes) {
  const void* pc = __builtin_return_address(0);
  Fiber& me = running();
  const size_t offset = shared_offset(destination), size = static_cast<size_t>(bytes);
  const auto address = reinterpret_cast<uintptr_t>(source);
  machine.counters.cp_async_bytes += static_cast<uint64_t>(source_bytes);
  if (machine.check) {
    if (!is_shared(destination)) {
      report("not-shared-memory", pc, "cp.async to %p", destination);
      give_up();
    }
    if (offset % size != 0 || address % size != 0) {
      report("misaligned-access", pc, "cp.async of %d bytes to shared offset %zu from %p", bytes,
             offset, source);
      give_up();
    }
    if (source_bytes > 0) {
      check_global(address, static_cast<size_t>(source_bytes), Access::Read, pc);
    }
    check_shared(offset, size, Access::Write, pc);
    set_pending(offset, size);
    memset(destination, 0xff, size);
  }
  if (machine.count) {
    if (source_bytes > 0) {
      record_access({pc, address, static_cast<uint16_t>(source_bytes), false, false});
    }
    // Another key than the load's: one instruction, two requests.
    const void* store = static_cast<const char*>(pc) - 1;
    record_access({store, reinterpret_cast<uintptr_t>(destination), static_cast<uint16_t>(bytes),
                   true, true});
  }
  me.copies.push_back({static_cast<unsigned char*>(destination),
                       static_cast<const unsigned char*>(source), bytes, source_bytes, pc});
}

void cp_async_commit() { running().group_ends.push_back(running().copies.size()); }

void cp_async_wait(int groups_left) {
  Fiber& me = running();
  const size_t left = static_cast<size_t>(groups_left);
  if (me.group_ends.size() <= left) return;
  const size_t arrived_groups = me.group_ends.size() - left;
  const size_t arrived = me.group_ends[arrived_groups - 1];
  for (size_t i = 0; i < arrived; ++i) {
    const Copy& copy = me.copies[i];
    memcpy(copy.destination, copy.source, static_cast<size_t>(copy.source_bytes));
    memset(copy.destination + copy.source_bytes, 0,
           static_cast<size_t>(copy.bytes - copy.source_bytes));
    if (machine.check) {
      set_arrived(shared_offset(copy.destination), static_cast<size_t>(copy.bytes));
    }
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<ptrdiff_t>(arrived));
  me.group_ends.erase(me.group_ends.begin(),
                      me.group_ends.begin() + static_cast<ptrdiff_t>(arrived_groups));
  for (size_t& end : me.group_ends) end -= arrived;
}

}  // namespace qn::simt
