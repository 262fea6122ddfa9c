#include "kernels/cuda/simt/report.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "kernels/cuda/simt/machine.h"

extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;  // this library's start

namespace qn::simt {
namespace {

std::vector<Report> found;

}  // namespace

void report(const char* kind, Where where, const char* format, ...) {
  // A return address belongs to the instruction before it.
  const uintptr_t pc = where.pc == nullptr ? 0
                                           : reinterpret_cast<uintptr_t>(where.pc) - 1 -
                                                 reinterpret_cast<uintptr_t>(&__ehdr_start);
  for (Report& earlier : found) {
    if (earlier.kind == kind && earlier.pc_offset == pc && earlier.line == where.line &&
        earlier.file == where.file && earlier.kernel == machine.launch->name) {
      ++earlier.occurrences;
      return;
    }
  }
  char message[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  Report report;
  report.kind = kind;
  report.kernel = machine.launch->name;
  report.block = current == nullptr ? Index3{} : current->block_idx;
  report.thread = current == nullptr ? -1 : current->linear;
  report.file = where.file;
  report.line = where.line;
  report.pc_offset = pc;
  report.occurrences = 1;
  report.message = message;
  found.push_back(std::move(report));
}

const std::vector<Report>& reports() { return found; }

void clear_reports() { found.clear(); }

}  // namespace qn::simt
