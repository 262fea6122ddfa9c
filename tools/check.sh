#!/usr/bin/env bash
# Everything that CI runs, in its order. Needs the tools of requirements-dev.txt on PATH and the package
# installed; builds under build/check.
#
# usage: tools/check.sh [--fast] [--after-pytest]
#   --fast          lint, types, rules, Release build with its self-test, pytest
#   --after-pytest  the whole test-suite has just passed: run only what differs from that
set -uo pipefail
cd "$(dirname "$0")/.."

fast=no
with_pytest=yes
for argument in "$@"; do
  case $argument in
    --fast) fast=yes ;;
    --after-pytest) with_pytest=no ;;
    *) echo "check.sh: argument is '$argument', expected --fast or --after-pytest" >&2; exit 2 ;;
  esac
done

jobs=$(nproc)
logs=build/check/logs
mkdir -p "$logs"
failed=()
# A level asked for outside would hide the others.
unset QN_ISA

# section TITLE COMMAND...: runs the command into a log; shows the log only when it fails.
section() {
  local title=$1 log start=$SECONDS
  shift
  log=$logs/${title//[^a-zA-Z0-9]/_}.log
  if "$@" >"$log" 2>&1; then
    echo "ok    $title  ($((SECONDS - start)) s)"
  else
    failed+=("$title")
    cat "$log"
    echo "FAIL  $title  ($((SECONDS - start)) s), log in $log"
  fi
}

heading() { printf '\n== %s\n' "$1"; }

native_sources() { git ls-files '*.h' '*.cpp' '*.cu' '*.cuh'; }

check_format() { native_sources | xargs clang-format --dry-run -Werror; }

# build NAME CMAKE_ARGS...: configures and builds the C++ self-test.
build() {
  local dir=build/check/$1
  shift
  cmake -S . -B "$dir" -G Ninja -DQN_PYTHON=OFF -DQN_TESTS=ON -DQN_WERROR=ON -DQN_CUDA=OFF "$@" &&
    cmake --build "$dir" -j "$jobs"
}

selftest_at() { QN_ISA=$2 "build/check/$1/selftest" test; }

host_levels() {
  build/check/release/selftest support | sed -n 's/^built  *//p' | tr ' ' '\n' |
    sed "/^$(build/check/release/selftest support | sed -n 's/^host  *//p')\$/q"
}

refuses_unknown_level() {
  QN_ISA=sse9 build/check/release/selftest test
  [ $? -eq 2 ]
}

heading "format, lint, types"
section "clang-format" check_format
section "ruff check" ruff check .
section "ruff format" ruff format --check .
section "mypy --strict" mypy

heading "rules"
section "layers" python tools/check_layers.py
section "op names" python tools/check_ops.py

heading "CUDA kernels, compiled for sm_80 and sm_90"
if command -v "${CUDACXX:-nvcc}" >/dev/null; then
  section "registers, spills, instructions" python tools/cuda_gate.py
else
  echo "left out: no nvcc on this machine"
fi

heading "gcc, Release, warnings are errors"
section "build release" build release
section "ISA objects" python tools/check_isa_objects.py build/check/release
levels=$(host_levels)
for level in $levels; do
  section "selftest QN_ISA=$level" selftest_at release "$level"
done
section "unknown QN_ISA is refused" refuses_unknown_level

if [ $fast = no ]; then
  heading "sanitizers"
  export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
  section "build address,undefined" build asan -DQN_SANITIZE=address,undefined
  section "selftest address,undefined" build/check/asan/selftest test
  # Threads are above the kernels: one level of these is enough, and four take eight minutes to build.
  section "build thread" build tsan -DQN_SANITIZE=thread -DQN_LEVELS=scalar
  section "selftest thread" build/check/tsan/selftest test

  heading "clang"
  clang=$(command -v clang++-19 || command -v clang++-16 || command -v clang++ || true)
  if [ -n "$clang" ]; then
    section "build with $clang" build clang -DCMAKE_CXX_COMPILER="$clang"
    section "selftest with $clang" build/check/clang/selftest test
  else
    echo "left out: no clang++ on this machine"
  fi
fi

heading "pytest"
if [ $with_pytest = yes ]; then
  section "pytest" pytest -q
fi
if [ $fast = no ] && [ -d tests/model ]; then
  for level in $levels; do
    # The demo model at the scalar level would take minutes for each answer.
    section "pytest tests/model QN_ISA=$level" env QN_ISA="$level" pytest -q tests/model -k "not demo"
  done
fi

heading "result"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all checks passed in $SECONDS s"
