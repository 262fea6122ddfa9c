// State of the executor, shared by its source files.
#pragma once
#include <string>
#include <vector>

#include "kernels/cuda/simt/executor.h"

#pragma GCC visibility push(hidden)

namespace qn::simt {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr size_t kMaxShared = 232448;  // 227 KiB, an H100's
constexpr int kBarriers = 16;
// A thread that touches memory so often without waiting for others waits for what never comes.
constexpr unsigned kEndless = 1u << 22;

struct Config {
  bool check = true;  // bounds, alignment, races, initialisation
  bool count = true;  // traffic
  unsigned seed = 0;  // 0: blocks, warps and lanes in order; else permuted
};

/// Counted since the last reset. Sectors are 32 bytes, wavefronts passes over the 32 banks;
/// "needed" is what the same bytes would have cost when packed.
struct Counters {
  uint64_t launches, blocks, barriers, switches;
  uint64_t mma, ldmatrix, ldmatrix_wavefronts, shuffles, atomics;
  uint64_t cp_async_bytes;
  uint64_t load_requests, load_sectors, load_sectors_needed, load_bytes;
  uint64_t store_requests, store_sectors, store_sectors_needed, store_bytes;
  uint64_t shared_requests, shared_wavefronts, shared_wavefronts_needed;
  uint64_t distinct_load_sectors, distinct_store_sectors;  // per launch, each sector once
};

/// cp.async that has been issued.
struct Copy {
  unsigned char* destination;
  const unsigned char* source;
  int bytes, source_bytes;
  const void* pc;
};

/// One access of one thread, for the counters.
struct AccessRecord {
  const void* pc;
  uintptr_t address;
  uint16_t bytes;
  bool write, shared;
};

enum class State : uint8_t { Ready, InCollective, AtBarrier, Done };

struct Fiber : Thread {
  void* stack_pointer;
  State state;
  bool fenced;              // has executed __threadfence
  const char* waiting_for;  // while not ready
  Site waiting_at;
  std::vector<Copy> copies;            // not yet waited for
  std::vector<size_t> group_ends;      // committed groups, as ends in `copies`
  std::vector<AccessRecord> accesses;  // since the warp last met
};

struct Machine {
  Config config;
  Counters counters;
  Fiber fibers[kMaxThreads];
  const Launch* launch;
  bool check, count;  // as configured, if the launch's kernel is instrumented
  int num_threads, num_warps;
  unsigned block;          // linear index of the running block
  unsigned launch_number;  // of this process, from 1
  unsigned barrier_epoch;  // barriers passed by the running block
  unsigned accesses;       // of memory, since a thread last had to wait
  // Vector clocks: warp w has seen everything that warp v did until its clock seen[w][v].
  uint32_t clock[kMaxWarps];
  uint32_t seen[kMaxWarps][kMaxWarps];
};
extern Machine machine;

inline Fiber& running() { return *static_cast<Fiber*>(current); }

/// Whether an access of thread `other` of this block, at its warp's clock `when`, is ordered before
/// everything that the running thread does now.
inline bool happened_before(int other, uint32_t when) {
  return other == current->linear || when <= machine.seen[current->warp][other / 32];
}

// report.cpp

/// Where an error is: an instruction's address (memory accesses) or a source line (operations).
struct Where {
  const void* pc = nullptr;
  const char* file = "";
  unsigned line = 0;
  Where(const void* address) : pc(address) {}
  Where(const Site& site) : file(site.file_name()), line(site.line()) {}
};

/// Notes an error of the running thread, once per kind and place; printf-like.
[[gnu::format(printf, 3, 4)]] void report(const char* kind, Where where, const char* format, ...);

/// Gives the launch up: returns to `run`, whatever the threads are doing.
[[noreturn]] void give_up();

// memory.cpp

void begin_launch_memory();
void begin_block_memory();
void check_shared(size_t offset, size_t bytes, Access kind, Where where);
void check_global(uintptr_t address, size_t bytes, Access kind, Where where);
/// Marks shared bytes as destination of a copy under way, and as arrived.
void set_pending(size_t offset, size_t bytes);
void set_arrived(size_t offset, size_t bytes);
bool is_shared(const void* address);
inline size_t shared_offset(const void* address) {
  return static_cast<size_t>(static_cast<const unsigned char*>(address) - shared_memory);
}
bool is_stack(uintptr_t address);
/// Counts sectors that this launch has not touched before.
void touch_sectors(uintptr_t address, size_t bytes, bool write);
void release_at(const void* address);
void acquire_at(const void* address);

// counters.cpp

void record_access(const AccessRecord& record);
/// Turns the accesses that a warp's threads have recorded into requests.
void account_warp(int warp);

// c_api.cpp

void record_launch(const Launch& launch);

}  // namespace qn::simt

#pragma GCC visibility pop
