// The only place that throws: QN_CHECK for the caller's mistakes, QN_FAIL for everything else.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace qn {

/// Something that is not the caller's mistake went wrong (RuntimeError in Python).
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A value given by the caller is not acceptable (ValueError in Python).
class ArgumentError : public Error {
 public:
  using Error::Error;
};

template <typename... Parts>
std::string join_message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace qn

/// Messages say "[op] name is <actual>, expected <what>".
#define QN_CHECK(condition, ...)                                                  \
  do {                                                                            \
    if (!(condition)) throw ::qn::ArgumentError(::qn::join_message(__VA_ARGS__)); \
  } while (false)

#define QN_FAIL(...) throw ::qn::Error(::qn::join_message(__VA_ARGS__))
