// What the scheduler knows of a sequence.
#pragma once
#include <cstdint>
#include <vector>

namespace qn::rt {

struct SequenceState {
  int64_t length = 0;          // tokens known so far: prompt and generated
  int64_t computed = 0;        // of these, tokens whose keys and values are in the cache
  std::vector<int32_t> pages;  // cache pages in order; capacity = pages.size() * page_tokens
};

}  // namespace qn::rt
