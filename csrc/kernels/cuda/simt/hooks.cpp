// The functions that -fsanitize=thread and -fsanitize=bounds,alignment make the compiler call.
// Kernels are compiled with these options but not linked with the sanitizers' libraries: every
// load and store of plain code arrives here, with its address, size and return address.
#include <cstring>

#include "kernels/cuda/simt/machine.h"

extern "C" {
// This library's bounds; its constant tables and the executor's own state lie between them.
__attribute__((visibility("hidden"))) extern const char __ehdr_start;
__attribute__((visibility("hidden"))) extern const char _end;
}

namespace qn::simt {

void access(const void* pointer, size_t bytes, Access kind, const void* pc) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (current == nullptr || is_stack(address) || bytes == 0) return;
  const auto module_begin = reinterpret_cast<uintptr_t>(&__ehdr_start);
  if (address - module_begin < reinterpret_cast<uintptr_t>(&_end) - module_begin) {
    if (kind == Access::Read || kind == Access::ReadOnly) return;
    report("write-to-static-variable", pc, "%zu bytes at %p", bytes, pointer);
    give_up();
  }
  // Kernel parameters.
  if (address - reinterpret_cast<uintptr_t>(machine.launch->closure) <
      machine.launch->closure_bytes) {
    return;
  }
  if (++machine.accesses > kEndless) {
    report("endless-loop", pc, "%u accesses of memory without waiting for anybody", kEndless);
    give_up();
  }
  const bool shared = is_shared(pointer);
  const size_t offset = shared_offset(pointer);
  if (machine.check) {
    if ((bytes & (bytes - 1)) == 0 && address % bytes != 0) {
      report("misaligned-access", pc, "%zu bytes at %s %#zx", bytes,
             shared ? "shared offset" : "address", shared ? offset : address);
      give_up();
    }
    if (shared) {
      check_shared(offset, bytes, kind, pc);
    } else {
      check_global(address, bytes, kind, pc);
    }
  }
  if (kind == Access::Atomic) {
    ++machine.counters.atomics;
    if (!shared) {
      acquire_at(pointer);
      if (running().fenced) release_at(pointer);
    }
  }
  if (machine.count) {
    const bool write = kind == Access::Write || kind == Access::Atomic;
    record_access({pc, address, static_cast<uint16_t>(bytes), write, shared});
  }
}

}  // namespace qn::simt

#define QN_CALLER __builtin_return_address(0)
#define QN_TSAN_ACCESS(name, bytes, kind) \
  void name(void* p) { qn::simt::access(p, bytes, qn::simt::Access::kind, QN_CALLER); }
#define QN_TSAN_SIZE(bytes)                                  \
  QN_TSAN_ACCESS(__tsan_read##bytes, bytes, Read)            \
  QN_TSAN_ACCESS(__tsan_write##bytes, bytes, Write)          \
  QN_TSAN_ACCESS(__tsan_volatile_read##bytes, bytes, Read)   \
  QN_TSAN_ACCESS(__tsan_volatile_write##bytes, bytes, Write) \
  QN_TSAN_ACCESS(__tsan_unaligned_read##bytes, bytes, Read)  \
  QN_TSAN_ACCESS(__tsan_unaligned_write##bytes, bytes, Write)

#pragma GCC visibility push(hidden)
extern "C" {

QN_TSAN_SIZE(1)
QN_TSAN_SIZE(2)
QN_TSAN_SIZE(4)
QN_TSAN_SIZE(8)
QN_TSAN_SIZE(16)

void __tsan_read_range(void* p, size_t bytes) {
  qn::simt::access(p, bytes, qn::simt::Access::Read, QN_CALLER);
}
void __tsan_write_range(void* p, size_t bytes) {
  qn::simt::access(p, bytes, qn::simt::Access::Write, QN_CALLER);
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  qn::simt::access(from, bytes, qn::simt::Access::Read, QN_CALLER);
  qn::simt::access(to, bytes, qn::simt::Access::Write, QN_CALLER);
  return memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  qn::simt::access(to, bytes, qn::simt::Access::Write, QN_CALLER);
  return memset(to, value, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

/// Leading member of what the undefined-behaviour sanitizer passes.
struct UbsanLocation {
  const char* file;
  uint32_t line, column;
};

// The access that follows would hit whatever lies there, if only the thread's own stack.
void __ubsan_handle_out_of_bounds(UbsanLocation* where, uintptr_t index) {
  if (qn::simt::current == nullptr) return;
  qn::simt::report("array-index-out-of-bounds", QN_CALLER, "index %zd in %s:%u",
                   static_cast<ptrdiff_t>(index), where->file, where->line);
  qn::simt::give_up();
}
void __ubsan_handle_type_mismatch_v1(UbsanLocation*, uintptr_t address) {
  if (qn::simt::current == nullptr) return;
  qn::simt::report("misaligned-access", QN_CALLER, "address %#zx", address);
  qn::simt::give_up();
}

}  // extern "C"
#pragma GCC visibility pop
