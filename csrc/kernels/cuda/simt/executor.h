// What a kernel source sees of the SIMT executor when it is compiled as host C++: who the running
// thread is, the operations that several threads perform together, and how a launch is described.
// docs/CUDA.md explains the model.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <source_location>

// Direct access instead of a detour over the library's offset table.
#pragma GCC visibility push(hidden)

namespace qn::simt {

/// A place in a kernel's source. As last default argument it names the caller's line, which
/// identifies an operation even where the compiler has duplicated or merged the code.
using Site = std::source_location;

struct Index3 {
  unsigned x, y, z;
};

/// The running thread, as kernel code sees it.
struct Thread {
  Index3 thread_idx, block_idx;
  int linear;  // index in its block
  int lane, warp;
};

extern Thread* current;  // null while host code runs
extern Index3 grid_dim, block_dim;
extern unsigned char* const shared_memory;  // of the running block, 1024-byte aligned

/// Bytes of one kernel argument, in the order of the kernel's parameters.
struct Argument {
  const void* data;
  size_t bytes;
};

struct Launch {
  const char* name;    // for reports
  const void* kernel;  // address of the compiled kernel
  Index3 grid, block;
  size_t shared_bytes;
  void (*body)(const void* closure);  // what every thread runs
  const void* closure;
  size_t closure_bytes;
  const Argument* arguments;
  int num_arguments;
  bool instrumented;  // compiled so that every access of memory is known
};

/// Runs all blocks of a grid, one after the other. Returns 0, or 1 when the launch was given up
/// because of an error after which it makes no sense to go on.
int run(const Launch& launch);

/// Runs the launch at once without a stream, else queues it (gpu_rt.cpp).
int submit(const Launch& launch, void* stream);

/// How memory is touched. ReadOnly is the non-coherent path: the data must not change during the
/// launch.
enum class Access : uint8_t { Read, ReadOnly, Write, Atomic };

/// Checks and counts one access of the running thread. `pc` locates it in the source.
void access(const void* address, size_t bytes, Access kind, const void* pc);

/// An operation that the lanes of a warp perform together: the lane that arrives last executes it
/// for all of them.
struct Operation {
  const char* name;
  void (*execute)(void* const* arguments, uint32_t lanes);  // arguments[lane] of every lane
};
void collective(const Operation& operation, void* argument, uint32_t mask, Site site);

struct ShuffleArgument {
  uint32_t value, result;
  int source;  // lane
};
extern const Operation kShuffle;

struct BallotArgument {
  bool predicate;
  uint32_t result;
};
extern const Operation kBallot;

enum class Reduction : uint8_t { Add, Min, Max, And, Or, Xor };
struct ReduceArgument {
  uint32_t value, result;
  Reduction reduction;
  bool is_signed;
};
extern const Operation kReduce;

struct LdmatrixArgument {
  const void* row;
  uint32_t* result;  // [matrices]
  int matrices;      // 1, 2 or 4
};
extern const Operation kLdmatrix, kLdmatrixTrans;

struct MmaArgument {
  void* d;            // float[4] or int32_t[4], in-out
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};
extern const Operation kMmaBf16, kMmaF16, kMmaS8;

/// bar.sync / bar.arrive; threads 0: all threads of the block.
void barrier(int id, int threads, bool wait, Site site);
void syncwarp(uint32_t mask, Site site);
void threadfence();

/// Copies `bytes` (4, 8 or 16) to shared memory: `source_bytes` of them from global memory, zeros
/// for the rest. The copy happens when its group is waited for.
void cp_async(void* destination, const void* source, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);

}  // namespace qn::simt

#pragma GCC visibility pop
