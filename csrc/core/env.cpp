#include "core/env.h"

#include <cerrno>
#include <cstdlib>

#include "core/error.h"

namespace qn::env {

std::optional<std::string> isa() {
  const char* value = std::getenv("QN_ISA");
  if (value == nullptr || *value == '\0') return std::nullopt;
  return std::string(value);
}

std::optional<int> threads() {
  const char* value = std::getenv("QN_THREADS");
  if (value == nullptr || *value == '\0') return std::nullopt;
  char* end = nullptr;
  errno = 0;
  const long count = std::strtol(value, &end, 10);
  QN_CHECK(errno == 0 && *end == '\0' && count >= 1 && count <= 1024, "[env] QN_THREADS is '",
           value, "', expected a number from 1 to 1024");
  return static_cast<int>(count);
}

bool cuda_graphs() {
  const char* value = std::getenv("QN_CUDA_GRAPHS");
  const std::string text = value == nullptr || *value == '\0' ? "1" : value;
  QN_CHECK(text == "0" || text == "1", "[env] QN_CUDA_GRAPHS is '", text, "', expected 0 or 1");
  return text == "1";
}

}  // namespace qn::env
