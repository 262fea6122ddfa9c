// Just enough of a test framework: TEST registers a function, CHECK and CHECK_THROWS count failures
// and go on.
#pragma once
#include <cstdio>
#include <exception>
#include <functional>
#include <string>
#include <vector>

namespace qn::test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline bool add(const char* name, void (*run)()) {
  tests().push_back({name, run});
  return true;
}

inline void fail(const char* file, int line, const std::string& what) {
  ++failures();
  std::printf("%s:%d: %s\n", file, line, what.c_str());
}

/// Empty when `body` throws an E whose message contains `part`, else what happened instead.
template <typename E>
std::string throws(const std::function<void()>& body, const std::string& part) {
  try {
    body();
  } catch (const E& error) {
    const std::string message = error.what();
    return message.find(part) != std::string::npos ? "" : "threw '" + message + "'";
  } catch (const std::exception& error) {
    return std::string("threw another type: ") + error.what();
  }
  return "threw nothing";
}

}  // namespace qn::test

#define TEST(name)                                                            \
  static void test_##name();                                                  \
  static const bool registered_##name = ::qn::test::add(#name, &test_##name); \
  static void test_##name()

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) ::qn::test::fail(__FILE__, __LINE__, "CHECK failed: " #condition); \
  } while (false)

#define CHECK_THROWS(E, part, ...)                                                            \
  do {                                                                                        \
    const std::string outcome = ::qn::test::throws<E>([&] { __VA_ARGS__; }, part);            \
    if (!outcome.empty())                                                                     \
      ::qn::test::fail(                                                                       \
          __FILE__, __LINE__,                                                                 \
          #__VA_ARGS__ " " + outcome + ", expected " #E " with '" + std::string(part) + "'"); \
  } while (false)
