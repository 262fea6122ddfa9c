#include "core/allocator.h"

#include <malloc.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "core/error.h"

namespace qn {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPage = 4096;
constexpr size_t kLargest = size_t{1} << 46;  // of one buffer; keeps the sums below from wrapping

size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

HostBuffer::HostBuffer(size_t bytes, bool huge_pages) : size_(bytes) {
  if (bytes == 0) return;
  QN_CHECK(bytes <= kLargest, "[allocator] size is ", bytes, " bytes, expected at most ", kLargest);
  const bool huge = huge_pages && bytes >= kHugePage;
  mapping_size_ = huge ? round_up(bytes, kHugePage) + kHugePage : round_up(bytes, kPage);
  mapping_ = mmap(nullptr, mapping_size_, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    QN_FAIL("[allocator] the system refused ", bytes, " bytes of memory");
  }
  data_ = mapping_;
  if (huge) {
    data_ = reinterpret_cast<void*>(round_up(reinterpret_cast<uintptr_t>(mapping_), kHugePage));
    madvise(data_, round_up(bytes, kHugePage), MADV_HUGEPAGE);
  }
}

HostBuffer::~HostBuffer() {
  if (mapping_ != nullptr) munmap(mapping_, mapping_size_);
}

HostBuffer::HostBuffer(HostBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapping_(std::exchange(other.mapping_, nullptr)),
      mapping_size_(std::exchange(other.mapping_size_, 0)) {}

HostBuffer& HostBuffer::operator=(HostBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapping_, other.mapping_);
  std::swap(mapping_size_, other.mapping_size_);
  return *this;
}

bool keep_heap(size_t reserve) {
  if (mallopt(M_MMAP_MAX, 0) == 0 || mallopt(M_TRIM_THRESHOLD, -1) == 0) return false;
  void* heap = std::malloc(reserve);
  if (heap == nullptr) return false;
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(heap), kHugePage);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(heap) + reserve) / kHugePage * kHugePage;
  const bool huge =
      begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
  std::free(heap);
  return huge;
}

void* Workspace::allocate(size_t bytes) {
  QN_CHECK(bytes <= kLargest, "[workspace] size is ", bytes, " bytes, expected at most ", kLargest);
  bytes = round_up(std::max<size_t>(bytes, 1), 64);
  while (chunk_ < chunks_.size() && used_ + bytes > chunks_[chunk_].size()) {
    ++chunk_;
    used_ = 0;
  }
  if (chunk_ == chunks_.size()) {
    add_chunk(std::max<size_t>(bytes, size_t{1} << 20));
    used_ = 0;
  }
  void* result = chunks_[chunk_].data() + used_;
  used_ += bytes;
  return result;
}

void Workspace::add_chunk(size_t bytes) {
  if (gpu_ == nullptr)
    chunks_.push_back({HostBuffer(bytes), {}});
  else
    chunks_.push_back({{}, GpuBuffer(*gpu_, bytes, "scratch memory")});
  ++generation_;
}

void Workspace::reset() {
  if (chunks_.size() > 1) {
    size_t total = 0;
    for (const Chunk& chunk : chunks_) total += chunk.size();
    chunks_.clear();
    add_chunk(total);
  }
  chunk_ = 0;
  used_ = 0;
}

Workspace::Scope::Scope(Workspace& workspace)
    : workspace_(workspace), chunk_(workspace.chunk_), used_(workspace.used_) {}

Workspace::Scope::~Scope() {
  workspace_.chunk_ = chunk_;
  workspace_.used_ = used_;
}

}  // namespace qn
