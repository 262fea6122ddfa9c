#include "core/checksum.h"

#include <cstring>

namespace qn {
namespace {

// Odd, so that multiplying by it loses nothing: 2^64 / golden ratio.
constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15;
constexpr int kLanes = 8;  // independent chains hide the latency of the multiplication

/// A bijection of `state` for every `word`, and of `word` for every `state`.
uint64_t mix(uint64_t state, uint64_t word) {
  state = (state ^ word) * kMultiplier;
  return state ^ (state >> 32);
}

}  // namespace

uint64_t checksum(const void* data, size_t size) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint64_t>(i);
  uint64_t words[kLanes];
  size_t done = 0;
  for (; size - done >= sizeof words; done += sizeof words) {
    std::memcpy(words, bytes + done, sizeof words);
    for (int i = 0; i < kLanes; ++i) lanes[i] = mix(lanes[i], words[i]);
  }
  if (done < size) {  // the rest is filled up with zeros; `size` below tells them from data
    std::memset(words, 0, sizeof words);
    std::memcpy(words, bytes + done, size - done);
    for (int i = 0; i < kLanes; ++i) lanes[i] = mix(lanes[i], words[i]);
  }
  uint64_t result = mix(kMultiplier, size);
  for (uint64_t lane : lanes) result = mix(result, lane);
  return mix(result, 0);
}

}  // namespace qn
