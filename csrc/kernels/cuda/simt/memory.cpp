// What the executor knows about every piece of memory: who wrote it, who read it, when, and whether
// it was written at all. A cell of such knowledge covers 16 bytes until a smaller access arrives;
// then all cells of that memory are split, so that none is ever accessed in part.
#include "kernels/cuda/simt/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <new>
#include <unordered_map>

#include "kernels/cuda/simt/machine.h"

namespace qn::simt {
namespace {

constexpr size_t kPage = 4096;
constexpr int kCoarsest = 4;  // log2 of the bytes that a cell covers at first

/// log2 of the largest cell size that neither end of an access cuts.
int granularity(size_t offset, size_t bytes) {
  const size_t bits = offset | bytes | (size_t{1} << kCoarsest);
  return __builtin_ctzll(bits);
}

// ---- shared memory

struct SharedCell {
  uint32_t write_clock;  // of the writer's warp
  uint32_t readers;      // warps that read it since the last write
  int16_t writer;        // thread, -1: never written
  bool atomic;           // the last write was atomic
  bool pending;          // destination of a copy under way
};

/// Stamp of the last read by one warp: its clock and which lane; several lanes at one clock are
/// kSeveralLanes.
constexpr uint32_t kSeveralLanes = 32;
constexpr uint32_t stamp(uint32_t clock, uint32_t lane) { return clock << 6 | lane; }

struct SharedShadow {
  int shift;
  std::vector<SharedCell> cells;
  std::vector<uint32_t> stamps;  // [cells][warps], valid where the cell's `readers` has the warp

  void reset() {
    const size_t count = (machine.launch->shared_bytes >> shift) + 1;
    cells.assign(count, SharedCell{0, 0, -1, false, false});
    stamps.resize(count * static_cast<size_t>(machine.num_warps));
  }

  void split(int finer) {
    const size_t factor = size_t{1} << (shift - finer), warps = size_t(machine.num_warps);
    std::vector<SharedCell> old_cells = std::move(cells);
    std::vector<uint32_t> old_stamps = std::move(stamps);
    cells.resize(old_cells.size() * factor);
    stamps.resize(cells.size() * warps);
    for (size_t i = 0; i < cells.size(); ++i) {
      cells[i] = old_cells[i / factor];
      std::copy_n(&old_stamps[i / factor * warps], warps, &stamps[i * warps]);
    }
    shift = finer;
  }

  void refine(size_t offset, size_t bytes) {
    const int needed = granularity(offset, bytes);
    if (needed < shift) split(needed);
  }
};

SharedShadow shared_shadow;

void check_readers(const SharedCell& cell, const uint32_t* stamps, size_t offset, Where where) {
  const int me = current->warp;
  for (uint32_t left = cell.readers; left != 0; left &= left - 1) {
    const int warp = __builtin_ctz(left);
    const uint32_t clock = stamps[warp] >> 6, lane = stamps[warp] & 63;
    const bool mine = warp == me && static_cast<int>(lane) == current->lane;
    if (mine || clock <= machine.seen[me][warp]) continue;
    const int other = warp * 32 + static_cast<int>(lane == kSeveralLanes ? 0 : lane);
    report("shared-race", where, "write at shared offset %zu, which %s %d has read unordered",
           offset, lane == kSeveralLanes ? "several lanes of the warp of thread" : "thread", other);
  }
}

// ---- global memory

struct GlobalCell {
  uint32_t launch;                   // in which the fields below (but `initialised`) were set
  uint32_t write_block, read_block;  // last ones, + 1
  uint32_t write_clock, read_clock;
  uint32_t read_epoch;  // barriers passed by the block when it was read last
  int16_t writer, reader;
  bool initialised;
  bool atomic;            // the last write was atomic
  bool many_read_blocks;  // read by several blocks
  bool many_readers;      // read by several unordered threads of read_block
};

struct Buffer {
  uintptr_t begin, end;
  void* mapping;
  size_t mapped_bytes;
  int shift = kCoarsest;
  std::vector<GlobalCell> cells;
  std::vector<uint32_t> loaded_in, stored_in;  // per 32-byte sector: last launch that touched it

  void refine(size_t offset, size_t bytes) {
    const int needed = granularity(offset, bytes);
    if (needed >= shift) return;
    const size_t factor = size_t{1} << (shift - needed);
    const std::vector<GlobalCell> old = std::move(cells);
    cells.resize(old.size() * factor);
    for (size_t i = 0; i < cells.size(); ++i) cells[i] = old[i / factor];
    shift = needed;
  }
};

std::map<uintptr_t, std::unique_ptr<Buffer>> buffers;  // by end
Buffer* last_hit = nullptr;

/// The live buffer that holds the byte at `address`, or null.
Buffer* find(uintptr_t address) {
  if (last_hit != nullptr && address >= last_hit->begin && address < last_hit->end) return last_hit;
  const auto found = buffers.upper_bound(address);
  if (found == buffers.end() || address < found->second->begin) return nullptr;
  return last_hit = found->second.get();
}

Buffer* find(const void* pointer, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Buffer* buffer = find(address);
  return buffer != nullptr && bytes <= buffer->end - address ? buffer : nullptr;
}

// ---- order between blocks: fence, then atomic by one; atomic on the same address by the other

using Blocks = std::vector<bool>;
Blocks acquired;  // blocks whose released writes the running block may read
std::unordered_map<uintptr_t, Blocks> released;

void join(Blocks& into, const Blocks& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = into[i] || from[i];
}

/// Whether the running block is ordered after `other` (+ 1, 0: nobody) or is the same.
bool ordered_after_block(uint32_t other) {
  return other == 0 || other == machine.block + 1 ||
         (other - 1 < acquired.size() && acquired[other - 1]);
}

void check_global_write(GlobalCell& cell, size_t offset, bool atomic, Where where) {
  const uint32_t me = machine.block + 1;
  const bool both_atomic = atomic && cell.atomic;
  if (!both_atomic && !ordered_after_block(cell.write_block)) {
    report("global-race-between-blocks", where, "write at buffer offset %zu, which block %u wrote",
           offset, cell.write_block - 1);
  }
  if (!atomic && (cell.many_read_blocks || !ordered_after_block(cell.read_block))) {
    report("global-race-between-blocks", where, "write at buffer offset %zu, which %s has read",
           offset, cell.many_read_blocks ? "more than one block" : "another block");
  }
  if (!both_atomic && cell.write_block == me && !happened_before(cell.writer, cell.write_clock)) {
    report("global-race", where, "write at buffer offset %zu, which thread %d wrote unordered",
           offset, cell.writer);
  }
  if (cell.read_block == me) {
    const bool unordered = cell.many_readers ? cell.read_epoch == machine.barrier_epoch
                                             : !happened_before(cell.reader, cell.read_clock);
    if (unordered && !atomic) {
      report("global-race", where, "write at buffer offset %zu, which thread %d has read unordered",
             offset, cell.reader);
    }
  }
  cell.write_block = me;
  cell.writer = static_cast<int16_t>(current->linear);
  cell.write_clock = machine.clock[current->warp];
  cell.atomic = atomic;
  cell.initialised = true;
}

void check_global_read(GlobalCell& cell, size_t offset, bool atomic, Where where) {
  const uint32_t me = machine.block + 1;
  if (!cell.initialised) {
    report("global-uninitialised-read", where, "buffer offset %zu", offset);
  }
  if (atomic) return;  // the write that belongs to it checks the order
  if (!ordered_after_block(cell.write_block)) {
    report("global-race-between-blocks", where,
           "read at buffer offset %zu, which block %u wrote in this launch", offset,
           cell.write_block - 1);
  }
  if (cell.write_block == me && !happened_before(cell.writer, cell.write_clock)) {
    report("global-race", where, "read at buffer offset %zu, which thread %d wrote unordered",
           offset, cell.writer);
  }
  if (cell.read_block != 0 && cell.read_block != me) cell.many_read_blocks = true;
  cell.many_readers =
      cell.read_block == me && (!happened_before(cell.reader, cell.read_clock) ||
                                (cell.many_readers && cell.read_epoch == machine.barrier_epoch));
  cell.read_block = me;
  cell.reader = static_cast<int16_t>(current->linear);
  cell.read_clock = machine.clock[current->warp];
  cell.read_epoch = machine.barrier_epoch;
}

}  // namespace

void* allocate(size_t bytes) {
  const size_t content = std::max<size_t>((bytes + 255) / 256 * 256, 256);
  const size_t length = (content + kPage - 1) / kPage * kPage;
  void* mapping =
      mmap(nullptr, length + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  auto* start = static_cast<unsigned char*>(mapping) + (length - content);
  if (mprotect(start + content, kPage, PROT_NONE) != 0) throw std::bad_alloc();
  memset(start, 0xff, content);
  auto buffer = std::make_unique<Buffer>();
  buffer->begin = reinterpret_cast<uintptr_t>(start);
  buffer->end = buffer->begin + bytes;
  buffer->mapping = mapping;
  buffer->mapped_bytes = length + kPage;
  buffer->cells.resize((bytes >> kCoarsest) + 1);
  buffer->loaded_in.resize(bytes / 32 + 1);
  buffer->stored_in.resize(bytes / 32 + 1);
  // An empty buffer contains no byte that could be found by address.
  const uintptr_t key = std::max(buffer->end, buffer->begin + 1);
  buffers[key] = std::move(buffer);
  return start;
}

bool release(void* pointer) {
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  const auto found = buffers.upper_bound(begin);
  if (found == buffers.end() || found->second->begin != begin) return false;
  munmap(found->second->mapping, found->second->mapped_bytes);
  buffers.erase(found);
  last_hit = nullptr;
  return true;
}

bool in_buffer(const void* pointer, size_t bytes) {
  return bytes == 0 || find(pointer, bytes) != nullptr;
}

bool mark_initialised(const void* pointer, size_t bytes) {
  if (bytes == 0) return true;
  Buffer* buffer = find(pointer, bytes);
  if (buffer == nullptr) return false;
  const size_t offset = reinterpret_cast<uintptr_t>(pointer) - buffer->begin;
  const size_t end = offset + bytes;
  // What lies behind the buffer's end belongs to nobody: no need to split for its sake.
  const bool to_the_end = end == buffer->end - buffer->begin;
  buffer->refine(offset, to_the_end ? size_t{1} << kCoarsest : bytes);
  const size_t last = ((end - 1) >> buffer->shift) + 1;
  for (size_t i = offset >> buffer->shift; i < last; ++i) buffer->cells[i].initialised = true;
  return true;
}

void begin_launch_memory() {
  shared_shadow.shift = kCoarsest;
  released.clear();
}

void begin_block_memory() {
  shared_shadow.reset();
  memset(shared_memory, 0xff, machine.launch->shared_bytes);
  acquired.clear();
}

void check_shared(size_t offset, size_t bytes, Access kind, Where where) {
  const size_t limit = machine.launch->shared_bytes;
  if (offset > limit || bytes > limit - offset) {
    report("shared-out-of-bounds", where, "%zu bytes at shared offset %zu of %zu", bytes, offset,
           limit);
    give_up();
  }
  SharedShadow& shadow = shared_shadow;
  shadow.refine(offset, bytes);
  const int warp = current->warp;
  const uint32_t clock = machine.clock[warp], lane = static_cast<uint32_t>(current->lane);
  const bool write = kind == Access::Write || kind == Access::Atomic;
  const size_t end = (offset + bytes) >> shadow.shift;
  for (size_t i = offset >> shadow.shift; i < end; ++i) {
    SharedCell& cell = shadow.cells[i];
    uint32_t* stamps = &shadow.stamps[i * static_cast<size_t>(machine.num_warps)];
    const size_t at = i << shadow.shift;
    if (cell.pending) {
      report("cp-async-pending", where,
             "%s shared offset %zu, whose copy by thread %d has not been waited for",
             write ? "write to" : "read of", at, cell.writer);
    }
    const bool both_atomic = kind == Access::Atomic && cell.atomic;
    if (cell.writer >= 0 && !both_atomic && !happened_before(cell.writer, cell.write_clock)) {
      report("shared-race", where, "%s at shared offset %zu, which thread %d wrote unordered",
             write ? "write" : "read", at, cell.writer);
    }
    if (kind != Access::Write && cell.writer < 0) {
      report("shared-uninitialised-read", where, "shared offset %zu", at);
    }
    if (write) {
      check_readers(cell, stamps, at, where);
      cell.writer = static_cast<int16_t>(current->linear);
      cell.write_clock = clock;
      cell.atomic = kind == Access::Atomic;
      cell.readers = 0;
    } else {
      const bool again = (cell.readers >> warp & 1) != 0 && stamps[warp] >> 6 == clock;
      const bool others = again && (stamps[warp] & 63) != lane;
      stamps[warp] = stamp(clock, others ? kSeveralLanes : lane);
      cell.readers |= 1u << warp;
    }
  }
}

void set_pending(size_t offset, size_t bytes) {
  const int shift = shared_shadow.shift;
  for (size_t i = offset >> shift; i < (offset + bytes) >> shift; ++i) {
    shared_shadow.cells[i].pending = true;
  }
}

void set_arrived(size_t offset, size_t bytes) {
  const int shift = shared_shadow.shift;
  for (size_t i = offset >> shift; i < (offset + bytes) >> shift; ++i) {
    SharedCell& cell = shared_shadow.cells[i];
    cell.pending = false;
    cell.writer = static_cast<int16_t>(current->linear);
    cell.write_clock = machine.clock[current->warp];
  }
}

void check_global(uintptr_t address, size_t bytes, Access kind, Where where) {
  Buffer* buffer = find(address);
  if (buffer == nullptr || bytes > buffer->end - address) {
    report("global-out-of-bounds", where, "%zu bytes at %#zx, %s", bytes, address,
           buffer == nullptr ? "in no live buffer" : "past the end of their buffer");
    give_up();
  }
  const size_t offset = address - buffer->begin;
  buffer->refine(offset, bytes);
  const size_t end = (offset + bytes) >> buffer->shift;
  for (size_t i = offset >> buffer->shift; i < end; ++i) {
    GlobalCell& cell = buffer->cells[i];
    const size_t at = i << buffer->shift;
    if (cell.launch != machine.launch_number) {
      const bool initialised = cell.initialised;
      cell = GlobalCell{};
      cell.initialised = initialised;
      cell.launch = machine.launch_number;
    }
    if (kind == Access::ReadOnly && cell.write_block != 0) {
      report("read-only-data-written", where,
             "buffer offset %zu is read as read-only, but block %u wrote it in this launch", at,
             cell.write_block - 1);
    }
    if (kind != Access::Write) check_global_read(cell, at, kind == Access::Atomic, where);
    if (kind == Access::Write || kind == Access::Atomic) {
      check_global_write(cell, at, kind == Access::Atomic, where);
    }
  }
}

void touch_sectors(uintptr_t address, size_t bytes, bool write) {
  Buffer* buffer = find(address);
  if (buffer == nullptr) return;
  std::vector<uint32_t>& touched = write ? buffer->stored_in : buffer->loaded_in;
  uint64_t& distinct =
      write ? machine.counters.distinct_store_sectors : machine.counters.distinct_load_sectors;
  const size_t first = (address - buffer->begin) / 32;
  const size_t last = (address + bytes - 1 - buffer->begin) / 32;
  for (size_t i = first; i <= last && i < touched.size(); ++i) {
    if (touched[i] == machine.launch_number) continue;
    touched[i] = machine.launch_number;
    ++distinct;
  }
}

void release_at(const void* address) {
  Blocks mine = acquired;
  if (mine.size() <= machine.block) mine.resize(machine.block + 1);
  mine[machine.block] = true;
  join(released[reinterpret_cast<uintptr_t>(address)], mine);
}

void acquire_at(const void* address) {
  const auto found = released.find(reinterpret_cast<uintptr_t>(address));
  if (found != released.end()) join(acquired, found->second);
}

}  // namespace qn::simt
