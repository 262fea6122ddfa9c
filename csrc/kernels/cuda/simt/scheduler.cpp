// Runs the threads of a block as fibers of one host thread, switching where they wait for each
// other: at barriers and at operations of a whole warp.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <new>
#include <numeric>
#include <random>

#include "kernels/cuda/simt/machine.h"

// Saves the callee-saved registers and the stack pointer, continues on another stack. Kernels
// change neither mxcsr nor the x87 control word, so these are left alone. ucontext would take two
// system calls for the same.
extern "C" __attribute__((visibility("hidden"))) void qn_simt_switch(void** saved, void* next);
asm(R"(
.text
.hidden qn_simt_switch
.globl qn_simt_switch
.type qn_simt_switch,@function
qn_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size qn_simt_switch, .-qn_simt_switch
)");

namespace qn::simt {
namespace {

constexpr size_t kStack = 64 << 10, kGuard = 4096;
constexpr size_t kFiberBytes = kStack + kGuard;

void* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

/// Stacks of all fibers, each above an inaccessible page.
unsigned char* map_stacks() {
  auto* stacks = static_cast<unsigned char*>(map_memory(kMaxThreads * kFiberBytes));
  for (size_t i = 0; i < kMaxThreads; ++i) {
    if (mprotect(stacks + i * kFiberBytes, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
  }
  return stacks;
}

/// Pages around the memory stay inaccessible.
unsigned char* map_shared() {
  auto* memory = static_cast<unsigned char*>(map_memory(kMaxShared + 2 * kGuard));
  mprotect(memory, kGuard, PROT_NONE);
  mprotect(memory + kGuard + kMaxShared / kGuard * kGuard + kGuard, kGuard, PROT_NONE);
  return memory + kGuard;
}

unsigned char* const stacks = map_stacks();
void* main_stack_pointer;
bool given_up;

// ---- ready threads

std::deque<int> ready;

void make_ready(int thread) {
  machine.fibers[thread].state = State::Ready;
  ready.push_back(thread);
}

/// Leaves the running fiber for the next ready one, or for `run` when there is none.
void switch_away() {
  Fiber& me = running();
  ++machine.counters.switches;
  machine.accesses = 0;
  if (ready.empty()) {
    current = nullptr;
    qn_simt_switch(&me.stack_pointer, main_stack_pointer);
    return;
  }
  Fiber& next = machine.fibers[ready.front()];
  ready.pop_front();
  current = &next;
  qn_simt_switch(&me.stack_pointer, next.stack_pointer);
}

void wait(State state, const char* what, const Site& site) {
  Fiber& me = running();
  me.state = state;
  me.waiting_for = what;
  me.waiting_at = site;
  switch_away();
}

[[noreturn]] void fiber_main() {
  machine.launch->body(machine.launch->closure);
  running().state = State::Done;
  switch_away();
  __builtin_unreachable();
}

/// A stack on which the first switch "returns" into fiber_main. Tops are staggered: equal
/// addresses modulo 64 KiB would share few cache sets.
void* fresh_stack(int thread) {
  auto* top = stacks + static_cast<size_t>(thread + 1) * kFiberBytes - 64 - thread % 32 * 192;
  auto** slot = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--slot = nullptr;  // the alignment that a function expects at its entry
  *--slot = reinterpret_cast<void*>(&fiber_main);
  for (int registers = 0; registers < 6; ++registers) *--slot = nullptr;
  return slot;
}

// ---- operations of a warp

struct Meeting {
  const Operation* operation;
  uint32_t mask, arrived;
  Site site;
  std::array<void*, 32> arguments;
};
constexpr int kMeetings = 4;  // disjoint groups of lanes of one warp that may meet at a time
struct Warp {
  Meeting meetings[kMeetings];
  int num_meetings;
};
Warp warps[kMaxWarps];

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && strcmp(a.file_name(), b.file_name()) == 0;
}

uint32_t lanes_of(int warp) {
  const int lanes = std::min(32, machine.num_threads - warp * 32);
  return lanes == 32 ? ~0u : (1u << lanes) - 1;
}

void tick(int warp) { machine.seen[warp][warp] = machine.clock[warp]++; }

const Operation kSyncwarp = {"__syncwarp", [](void* const*, uint32_t) { tick(current->warp); }};

// ---- barriers

struct Barrier {
  int arrived, expected;
  uint32_t waiting_warps, warps;
  std::vector<int> waiting;
  Site site;
};
Barrier barriers[kBarriers];

void release_barrier(Barrier& barrier) {
  uint32_t joined[kMaxWarps] = {};
  for (int warp = 0; warp < machine.num_warps; ++warp) {
    if ((barrier.warps >> warp & 1) == 0) continue;
    for (int other = 0; other < machine.num_warps; ++other) {
      const uint32_t seen = other == warp ? machine.clock[warp] : machine.seen[warp][other];
      joined[other] = std::max(joined[other], seen);
    }
  }
  for (int warp = 0; warp < machine.num_warps; ++warp) {
    if ((barrier.warps >> warp & 1) == 0) continue;
    // A warp that only arrived has told the others what it did, but learnt nothing.
    if (barrier.waiting_warps >> warp & 1) memcpy(machine.seen[warp], joined, sizeof joined);
    ++machine.clock[warp];
    if (machine.count) account_warp(warp);
  }
  for (const int thread : barrier.waiting) {
    if (thread != current->linear) make_ready(thread);
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.warps = barrier.waiting_warps = 0;
  ++machine.counters.barriers;
  ++machine.barrier_epoch;
}

// ---- blocks

void start_threads(const Index3& block_idx, std::minstd_rand* random) {
  const Index3 size = machine.launch->block;
  ready.clear();
  for (auto& warp : warps) warp.num_meetings = 0;
  for (auto& barrier : barriers) {
    barrier.waiting.clear();
    barrier.arrived = 0;
    barrier.warps = barrier.waiting_warps = 0;
  }
  memset(machine.seen, 0, sizeof machine.seen);
  std::fill(std::begin(machine.clock), std::end(machine.clock), 1u);
  machine.barrier_epoch = 0;
  machine.accesses = 0;
  for (int i = 0; i < machine.num_threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    const unsigned linear = static_cast<unsigned>(i);
    fiber.thread_idx = {linear % size.x, linear / size.x % size.y, linear / size.x / size.y};
    fiber.block_idx = block_idx;
    fiber.linear = i;
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    fiber.fenced = false;
    fiber.stack_pointer = fresh_stack(i);
    fiber.copies.clear();
    fiber.group_ends.clear();
    fiber.accesses.clear();
  }
  std::array<int, kMaxWarps> order;
  std::iota(order.begin(), order.end(), 0);
  std::array<int, 32> lanes;
  std::iota(lanes.begin(), lanes.end(), 0);
  if (random != nullptr) std::shuffle(order.begin(), order.begin() + machine.num_warps, *random);
  for (int i = 0; i < machine.num_warps; ++i) {
    if (random != nullptr) std::shuffle(lanes.begin(), lanes.end(), *random);
    for (const int lane : lanes) {
      const int thread = order[static_cast<size_t>(i)] * 32 + lane;
      if (thread < machine.num_threads) make_ready(thread);
    }
  }
}

void report_deadlock() {
  const Fiber* first = nullptr;
  int stuck = 0;
  for (int i = 0; i < machine.num_threads; ++i) {
    if (machine.fibers[i].state == State::Done) continue;
    if (first == nullptr) first = &machine.fibers[i];
    ++stuck;
  }
  if (first == nullptr) return;
  current = const_cast<Fiber*>(first);
  std::string others;
  for (int i = first->linear + 1; i < machine.num_threads && others.size() < 100; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.state == State::Done || same_place(fiber.waiting_at, first->waiting_at)) continue;
    others += ", thread " + std::to_string(i) + " at " + fiber.waiting_for + " in line " +
              std::to_string(fiber.waiting_at.line());
  }
  report("deadlock", first->waiting_at,
         "%d of %d threads wait for ever: thread %d at %s in line %u%s", stuck, machine.num_threads,
         first->linear, first->waiting_for, first->waiting_at.line(), others.c_str());
  current = nullptr;
  given_up = true;
}

void check_copies_have_arrived() {
  for (int i = 0; i < machine.num_threads; ++i) {
    for (const Copy& copy : machine.fibers[i].copies) {
      if (copy.source_bytes == 0) continue;
      current = &machine.fibers[i];
      report("cp-async-never-waited-for", copy.pc, "%d bytes at shared offset %zu", copy.bytes,
             shared_offset(copy.destination));
      current = nullptr;
    }
  }
}

void run_block(const Index3& block_idx, std::minstd_rand* random) {
  begin_block_memory();
  start_threads(block_idx, random);
  Fiber& first = machine.fibers[ready.front()];
  ready.pop_front();
  current = &first;
  qn_simt_switch(&main_stack_pointer, first.stack_pointer);
  current = nullptr;
  ++machine.counters.blocks;
  if (given_up) return;
  report_deadlock();
  if (given_up) return;
  if (machine.check) check_copies_have_arrived();
  if (machine.count) {
    for (int warp = 0; warp < machine.num_warps; ++warp) account_warp(warp);
  }
}

bool fits_the_hardware(const Launch& launch) {
  const Index3 &grid = launch.grid, &block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    report("bad-launch", Where(nullptr), "block is (%u, %u, %u), expected 1 to 1024 threads",
           block.x, block.y, block.z);
    return false;
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    report("bad-launch", Where(nullptr),
           "grid is (%u, %u, %u), expected 1 to (2147483647, 65535, 65535)", grid.x, grid.y,
           grid.z);
    return false;
  }
  if (launch.shared_bytes > kMaxShared) {
    report("bad-launch", Where(nullptr), "%zu bytes of shared memory, expected at most %zu",
           launch.shared_bytes, kMaxShared);
    return false;
  }
  return true;
}

}  // namespace

Machine machine;
Thread* current = nullptr;
Index3 grid_dim, block_dim;
unsigned char* const shared_memory = map_shared();

bool is_stack(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(stacks) < kMaxThreads * kFiberBytes;
}

bool is_shared(const void* address) { return shared_offset(address) < kMaxShared + kGuard; }

void give_up() {
  given_up = true;
  void* dropped;
  qn_simt_switch(&dropped, main_stack_pointer);
  __builtin_unreachable();
}

void collective(const Operation& operation, void* argument, uint32_t mask, Site site) {
  Fiber& me = running();
  Warp& warp = warps[me.warp];
  if ((mask >> me.lane & 1) == 0) {
    report("lane-outside-its-mask", site, "lane %d calls %s with mask %#010x", me.lane,
           operation.name, mask);
    give_up();
  }
  mask &= lanes_of(me.warp);
  Meeting* meeting = nullptr;
  for (int i = 0; i < warp.num_meetings; ++i) {
    if (warp.meetings[i].mask >> me.lane & 1) meeting = &warp.meetings[i];
  }
  if (meeting == nullptr) {
    if (warp.num_meetings == kMeetings) {
      report("divergent-warp", site, "more than %d groups of lanes meet at once", kMeetings);
      give_up();
    }
    meeting = &warp.meetings[warp.num_meetings++];
    *meeting = Meeting{&operation, mask, 0, site, {}};
  } else if (meeting->operation != &operation || meeting->mask != mask ||
             !same_place(meeting->site, site)) {
    report("divergent-warp", site,
           "lane %d calls %s with mask %#010x while others of its warp wait at %s of line %u with "
           "mask %#010x",
           me.lane, operation.name, mask, meeting->operation->name, meeting->site.line(),
           meeting->mask);
    give_up();
  }
  meeting->arguments[static_cast<size_t>(me.lane)] = argument;
  meeting->arrived |= 1u << me.lane;
  if (meeting->arrived != meeting->mask) {
    wait(State::InCollective, operation.name, site);
    return;
  }
  const Meeting complete = *meeting;
  *meeting = warp.meetings[--warp.num_meetings];
  me.waiting_at = site;  // for reports
  operation.execute(complete.arguments.data(), complete.mask);
  if (machine.count && mask == lanes_of(me.warp)) account_warp(me.warp);
  for (uint32_t left = complete.mask & ~(1u << me.lane); left != 0; left &= left - 1) {
    make_ready(me.warp * 32 + __builtin_ctz(left));
  }
}

void syncwarp(uint32_t mask, Site site) {
  const uint32_t lanes = lanes_of(current->warp);
  if ((mask & lanes) != lanes) {
    report("not-modelled", site, "__syncwarp with mask %#010x, expected all lanes of the warp",
           mask);
    give_up();
  }
  collective(kSyncwarp, nullptr, mask, site);
}

void barrier(int id, int threads, bool wait_for_others, Site site) {
  const int expected = threads == 0 ? machine.num_threads : threads;
  if (id < 0 || id >= kBarriers || expected < 1 || expected > machine.num_threads ||
      (threads != 0 && threads % 32 != 0)) {
    report("bad-barrier", site,
           "barrier %d of %d threads, expected 0 to 15 and a multiple of 32 up to %d", id, threads,
           machine.num_threads);
    give_up();
  }
  Barrier& barrier = barriers[id];
  const uint32_t warp_bit = 1u << current->warp;
  // Barrier 0 is __syncthreads, which all threads must reach in the same place; a named one may
  // stand in several places, but not for lanes of one warp.
  if (barrier.arrived > 0 && (id == 0 || (barrier.warps & warp_bit) != 0) &&
      !same_place(barrier.site, site)) {
    report("divergent-barrier", site, "others wait at the barrier of line %u", barrier.site.line());
    give_up();
  }
  if (barrier.arrived > 0 && barrier.expected != expected) {
    report("bad-barrier", site, "barrier %d is for %d threads here and for %d in line %u", id,
           expected, barrier.expected, barrier.site.line());
    give_up();
  }
  barrier.site = site;
  barrier.expected = expected;
  barrier.warps |= warp_bit;
  if (wait_for_others) {
    barrier.waiting_warps |= warp_bit;
    barrier.waiting.push_back(current->linear);
  }
  if (++barrier.arrived == expected) {
    release_barrier(barrier);
  } else if (wait_for_others) {
    wait(State::AtBarrier, id == 0 ? "__syncthreads" : "a named barrier", site);
  }
}

void threadfence() { running().fenced = true; }

int run(const Launch& launch) {
  machine.launch = &launch;
  machine.check = machine.config.check && launch.instrumented;
  machine.count = machine.config.count && launch.instrumented;
  ++machine.counters.launches;
  if (!fits_the_hardware(launch)) return 1;
  record_launch(launch);
  ++machine.launch_number;
  machine.num_threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  machine.num_warps = (machine.num_threads + 31) / 32;
  grid_dim = launch.grid;
  block_dim = launch.block;
  given_up = false;
  begin_launch_memory();
  std::minstd_rand random(machine.config.seed);
  std::minstd_rand* order = machine.config.seed == 0 ? nullptr : &random;
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  std::vector<unsigned> sequence(blocks);
  std::iota(sequence.begin(), sequence.end(), 0u);
  if (order != nullptr) std::shuffle(sequence.begin(), sequence.end(), *order);
  for (const unsigned block : sequence) {
    machine.block = block;
    const unsigned x = block % launch.grid.x, rest = block / launch.grid.x;
    run_block({x, rest % launch.grid.y, rest / launch.grid.y}, order);
    if (given_up) break;
  }
  current = nullptr;
  return given_up ? 1 : 0;
}

}  // namespace qn::simt
