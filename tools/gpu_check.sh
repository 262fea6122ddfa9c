#!/usr/bin/env bash
# The kernels and the backend on a real GPU, in about ten minutes on a machine with the package
# installed from this checkout (pip install -e '.[train]' with QN_CMAKE_ARGS=-DQN_CUDA=ON) and pytest:
# self-test of every kernel, generation, compute-sanitizer, measurements beside torch. Writes
# OUT/gpu_check.json and OUT/gpu_check.md.
#
# usage: tools/gpu_check.sh [OUT] [MODEL]     default: build/gpu_check demo
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu_check}
model=${2:-demo}
mkdir -p "$out"
checks=$out/checks.tsv
: > "$checks"
failed=0

library=$(python -c 'from qwen_native.devices import cuda_library; print(cuda_library())') || exit 2
if [ ! -f "$library" ]; then
  echo "gpu_check.sh: $library is missing, expected a build with QN_CMAKE_ARGS=-DQN_CUDA=ON" >&2
  exit 2
fi

# check NAME SECONDS COMMAND...: runs the command for at most so long and notes how it ended.
check() {
  local name=$1 seconds=$2 log
  shift 2
  log=$out/${name// /_}.log
  timeout "$seconds" "$@" > "$log" 2>&1
  case $? in
    0) result="passed: $(tail -n 1 "$log")" ;;
    124) result="stopped after $seconds s" ;;
    *) result="FAILED, see $log"; failed=1 ;;
  esac
  printf '%s\t%s\n' "$name" "$result" | tee -a "$checks"
}

export QN_CUDA_LIBRARY=$library
tests=(python -m pytest -q -p no:cacheprovider tests/cuda)
check "the GPU" 60 python -c \
  'from qwen_native.devices import open_device; print(open_device("cuda")[1].info())'
check "kernels and backend" 300 "${tests[@]}"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    check "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "${tests[@]}" \
      -k "gemm or attention or rope or sampling or rms_norm"
  done
else
  printf 'compute-sanitizer\tnot on this machine\n' | tee -a "$checks"
fi
unset QN_CUDA_LIBRARY
python tools/gpu_bench.py "$library" "$model" "$out/gpu_check.json" "$out/gpu_check.md" \
  --checks "$checks" || failed=1
cat "$out/gpu_check.md"
exit $failed
