// The executor as tests see it, through ctypes (tests/cuda/simulator.py).
#include <cstdio>
#include <cstring>
#include <new>

#include "kernels/cuda/simt/line_counters.h"
#include "kernels/cuda/simt/machine.h"
#include "kernels/cuda/simt/memory.h"
#include "kernels/cuda/simt/report.h"

extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;

namespace qn::simt {
namespace {

std::string recorded;
bool recording = false;

uintptr_t offset_in_library(const void* pc) {
  return reinterpret_cast<uintptr_t>(pc) - reinterpret_cast<uintptr_t>(&__ehdr_start);
}

/// Hands out text that stays valid until the next call.
const char* keep(std::string text) {
  static std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

}  // namespace

void record_launch(const Launch& launch) {
  if (!recording) return;
  char line[256];
  snprintf(line, sizeof line, "%zx\t%u %u %u\t%u %u %u\t%zu\t", offset_in_library(launch.kernel),
           launch.grid.x, launch.grid.y, launch.grid.z, launch.block.x, launch.block.y,
           launch.block.z, launch.shared_bytes);
  recorded += launch.name;
  recorded += '\t';
  recorded += line;
  for (int i = 0; i < launch.num_arguments; ++i) {
    const auto* data = static_cast<const unsigned char*>(launch.arguments[i].data);
    for (size_t byte = 0; byte < launch.arguments[i].bytes; ++byte) {
      snprintf(line, sizeof line, "%02x", data[byte]);
      recorded += line;
    }
    recorded += ' ';
  }
  recorded += '\n';
}

}  // namespace qn::simt

#pragma GCC visibility push(default)
extern "C" {

using namespace qn::simt;

/// Null when there is no memory.
void* qn_simt_alloc(size_t bytes) {
  try {
    return allocate(bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

/// 0, or 1 when `pointer` is not the start of a live buffer.
int qn_simt_free(void* pointer) { return release(pointer) ? 0 : 1; }

/// 0, or 1 when the bytes are not within one live buffer.
int qn_simt_upload(void* to, const void* from, size_t bytes) {
  if (!mark_initialised(to, bytes)) return 1;
  memcpy(to, from, bytes);
  return 0;
}

int qn_simt_download(void* to, const void* from, size_t bytes) {
  if (!in_buffer(from, bytes)) return 1;
  memcpy(to, from, bytes);
  return 0;
}

void qn_simt_configure(int check, int count, unsigned seed) {
  machine.config = Config{check != 0, count != 0, seed};
}

/// One report per line: kind, kernel, block, thread, file, line, pc, occurrences, message; with
/// tabs between.
const char* qn_simt_reports() {
  std::string text;
  for (const Report& report : reports()) {
    char numbers[160];
    snprintf(numbers, sizeof numbers, "%u %u %u\t%d\t", report.block.x, report.block.y,
             report.block.z, report.thread);
    text += report.kind + '\t' + report.kernel + '\t' + numbers + report.file;
    snprintf(numbers, sizeof numbers, "\t%u\t%zx\t%zu\t", report.line, report.pc_offset,
             static_cast<size_t>(report.occurrences));
    text += numbers + report.message + '\n';
  }
  return keep(std::move(text));
}

void qn_simt_clear_reports() { clear_reports(); }

void qn_simt_counters(Counters* counters) { *counters = machine.counters; }

/// One instruction per line: pc, shared, write, requests, units, units needed, bytes.
const char* qn_simt_line_counters() {
  std::string text;
  for (const auto& [pc, line] : line_counters()) {
    char numbers[200];
    snprintf(numbers, sizeof numbers, "%zx\t%d\t%d\t%zu\t%zu\t%zu\t%zu\n",
             offset_in_library(pc) - 1, line.shared, line.write, static_cast<size_t>(line.requests),
             static_cast<size_t>(line.units), static_cast<size_t>(line.units_needed),
             static_cast<size_t>(line.bytes));
    text += numbers;
  }
  return keep(std::move(text));
}

void qn_simt_clear_counters() { clear_counters(); }

/// Starts (1) or stops (0) to note every launch.
void qn_simt_record_launches(int on) {
  recording = on != 0;
  recorded.clear();
}

/// One launch per line: name, kernel address, grid, block, shared bytes, arguments in hex.
const char* qn_simt_recorded_launches() { return keep(recorded); }

}  // extern "C"
#pragma GCC visibility pop
