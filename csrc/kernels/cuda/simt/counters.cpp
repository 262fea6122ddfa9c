// From the accesses of single threads to the requests of a warp: which 32-byte sectors a global
// load or store touches, how many passes over the banks a shared one takes.
#include <algorithm>
#include <array>
#include <map>
#include <unordered_map>

#include "kernels/cuda/simt/line_counters.h"
#include "kernels/cuda/simt/machine.h"

namespace qn::simt {
namespace {

std::unordered_map<const void*, LineCounters> per_pc;

/// The same instruction of up to 32 lanes; null where a lane does not take part.
using Request = std::array<const AccessRecord*, 32>;

const AccessRecord& first_of(const Request& request) {
  return **std::find_if(request.begin(), request.end(), [](auto* record) { return record; });
}

/// Distinct units of 2^shift bytes that the request touches.
int distinct_units(const Request& request, int shift) {
  std::array<uintptr_t, 32 * 16> units;
  size_t count = 0;
  for (const AccessRecord* record : request) {
    if (record == nullptr) continue;
    const uintptr_t last = (record->address + record->bytes - 1) >> shift;
    for (uintptr_t unit = record->address >> shift; unit <= last && count < units.size(); ++unit) {
      units[count++] = unit;
    }
  }
  std::sort(units.begin(), units.begin() + count);
  return static_cast<int>(std::unique(units.begin(), units.begin() + count) - units.begin());
}

/// Passes over the 32 banks: lanes are served in groups that together ask for 128 bytes; within a
/// group every pass gives one word of each bank.
int wavefronts(const Request& request, int bytes, int* needed) {
  const int lanes_per_group = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  int passes = 0;
  for (int begin = 0; begin < 32; begin += lanes_per_group) {
    std::array<std::array<uintptr_t, 32>, 32> words;
    std::array<int, 32> used = {};
    int most = 0;
    for (int lane = begin; lane < begin + lanes_per_group; ++lane) {
      const AccessRecord* record = request[static_cast<size_t>(lane)];
      if (record == nullptr) continue;
      const uintptr_t last = (record->address + record->bytes - 1) / 4;
      for (uintptr_t word = record->address / 4; word <= last; ++word) {
        const size_t bank = word % 32;
        const auto end = words[bank].begin() + used[bank];
        if (std::find(words[bank].begin(), end, word) != end) continue;
        *end = word;
        most = std::max(most, ++used[bank]);
      }
    }
    passes += most;
    *needed += most > 0;
  }
  return passes;
}

void account(const Request& request) {
  const AccessRecord& record = first_of(request);
  Counters& total = machine.counters;
  LineCounters& line = per_pc[record.pc];
  line.shared = record.shared;
  line.write = record.write;
  ++line.requests;
  if (record.shared) {
    int needed = 0;
    const int passes = wavefronts(request, record.bytes, &needed);
    line.units += static_cast<uint64_t>(passes);
    line.units_needed += static_cast<uint64_t>(needed);
    ++total.shared_requests;
    total.shared_wavefronts += static_cast<uint64_t>(passes);
    total.shared_wavefronts_needed += static_cast<uint64_t>(needed);
    return;
  }
  const auto sectors = static_cast<uint64_t>(distinct_units(request, 5));
  // Two-byte units are fine enough: nobody packs single bytes across lanes.
  const int unit_shift = record.bytes == 1 ? 0 : 1;
  const auto bytes = static_cast<uint64_t>(distinct_units(request, unit_shift)) << unit_shift;
  const uint64_t needed = (bytes + 31) / 32;
  line.units += sectors;
  line.units_needed += needed;
  line.bytes += bytes;
  (record.write ? total.store_requests : total.load_requests) += 1;
  (record.write ? total.store_sectors : total.load_sectors) += sectors;
  (record.write ? total.store_sectors_needed : total.load_sectors_needed) += needed;
  (record.write ? total.store_bytes : total.load_bytes) += bytes;
  for (const AccessRecord* each : request) {
    if (each != nullptr) touch_sectors(each->address, each->bytes, each->write);
  }
}

/// Whether all lanes have executed the same accesses, in which case the n-th ones belong together.
bool converged(int first, int lanes) {
  const auto& reference = machine.fibers[first].accesses;
  for (int lane = 1; lane < lanes; ++lane) {
    const auto& accesses = machine.fibers[first + lane].accesses;
    const auto same = [](const AccessRecord& a, const AccessRecord& b) { return a.pc == b.pc; };
    if (!std::equal(accesses.begin(), accesses.end(), reference.begin(), reference.end(), same)) {
      return false;
    }
  }
  return true;
}

}  // namespace

void record_access(const AccessRecord& record) { running().accesses.push_back(record); }

void account_warp(int warp) {
  const int first = warp * 32, lanes = std::min(32, machine.num_threads - first);
  if (converged(first, lanes)) {
    for (size_t i = 0; i < machine.fibers[first].accesses.size(); ++i) {
      Request request = {};
      for (int lane = 0; lane < lanes; ++lane) {
        request[static_cast<size_t>(lane)] = &machine.fibers[first + lane].accesses[i];
      }
      account(request);
    }
  } else {
    // The n-th execution of an instruction by one lane belongs to the n-th of the others.
    std::map<std::pair<const void*, int>, Request> requests;
    for (int lane = 0; lane < lanes; ++lane) {
      std::unordered_map<const void*, int> executions;
      for (const AccessRecord& record : machine.fibers[first + lane].accesses) {
        requests[{record.pc, executions[record.pc]++}][static_cast<size_t>(lane)] = &record;
      }
    }
    for (const auto& [key, request] : requests) account(request);
  }
  for (int lane = 0; lane < lanes; ++lane) machine.fibers[first + lane].accesses.clear();
}

const std::unordered_map<const void*, LineCounters>& line_counters() { return per_pc; }

void clear_counters() {
  machine.counters = {};
  per_pc.clear();
}

}  // namespace qn::simt
