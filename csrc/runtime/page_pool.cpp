#include "runtime/page_pool.h"

namespace qn::rt {

PagePool::PagePool(int64_t pages) : references_(static_cast<size_t>(pages), 0) {
  for (int64_t page = pages - 1; page >= 0; --page) free_.push_back(static_cast<int32_t>(page));
}

std::optional<int32_t> PagePool::allocate() {
  if (free_.empty()) return std::nullopt;
  const int32_t page = free_.back();
  free_.pop_back();
  references_[static_cast<size_t>(page)] = 1;
  return page;
}

void PagePool::share(int32_t page) { ++references_[static_cast<size_t>(page)]; }

void PagePool::release(int32_t page) {
  if (--references_[static_cast<size_t>(page)] == 0) free_.push_back(page);
}

}  // namespace qn::rt
