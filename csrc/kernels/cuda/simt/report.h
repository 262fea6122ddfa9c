// Errors found in kernels, kept until somebody asks.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/cuda/simt/executor.h"

namespace qn::simt {

struct Report {
  std::string kind;    // "shared-race", ...
  std::string kernel;  // as named at its launch
  Index3 block;        // of the first occurrence
  int thread;          // linear index in the block, -1: the block as a whole
  std::string file;    // empty when `pc_offset` says where
  unsigned line;
  uintptr_t pc_offset;  // in this library, for addr2line; 0: none
  uint64_t occurrences;
  std::string message;
};

/// What has been found since the last clear, oldest first.
const std::vector<Report>& reports();
void clear_reports();

}  // namespace qn::simt
