// Which pages of the KV cache are in use. Integers only.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

namespace qn::rt {

/// Pages are handed out lowest first while none has been returned, so that the memory behind them
/// is touched in order. A page may be shared by several sequences (forks of one prompt); it is free
/// again when all have released it.
class PagePool {
 public:
  explicit PagePool(int64_t pages);

  int64_t total() const { return static_cast<int64_t>(references_.size()); }
  int64_t free() const { return static_cast<int64_t>(free_.size()); }

  std::optional<int32_t> allocate();
  void share(int32_t page);
  void release(int32_t page);

 private:
  std::vector<int32_t> free_;
  std::vector<int32_t> references_;
};

}  // namespace qn::rt
