"""From a fresh process to its first token, and the memory that it takes at most.

    python benchmarks/start.py --weights int4

Each run is a process of its own that loads the packed file, answers a short prompt with 32 tokens
and reports its peak resident memory, the mapped weights included. The file is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

from harness import store

CHILD = """
import json, sys, time
from pathlib import Path
from qwen_native import LLM
def peak():  # of this program alone; getrusage would start with that of its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
before = peak()
begin = time.perf_counter()
llm = LLM(sys.argv[1] or None, weights=sys.argv[2], threads=int(sys.argv[3]))
loaded = time.perf_counter()
stream = llm.stream("def fibonacci(n):", max_new_tokens=32, temperature=0.0, ignore_eos=True)
next(stream)
first = time.perf_counter()
for _ in stream: pass
print(json.dumps({"load": loaded - begin, "first_token": first - begin, "peak": peak(),
                  "before": before, "weights": llm.model.weight_bytes}))
"""


def main() -> None:
    """Run the processes and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="folder, .gguf file or id; default: the demo")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    command = [sys.executable, "-c", CHILD, options.model, options.weights, str(options.threads)]
    runs = []
    for run in range(options.rounds + 1):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        if run > 0:  # the first run makes the packed file, or reads it into the page cache
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    mb = 1e-6
    print(f"{options.weights}, {options.threads} threads, medians of {options.rounds} processes")
    print(f"loaded after       {median['load']:8.3f} s")
    print(f"first token after  {median['first_token']:8.3f} s")
    print(f"packed weights     {median['weights'] * mb:8.1f} MB")
    print(f"peak memory        {median['peak'] * mb:8.1f} MB,", end=" ")
    print(f"{median['before'] * mb:.1f} of them Python and the imports,", end=" ")
    print(f"{median['peak'] / median['weights']:.2f}x the weights")
    if options.json:
        store(f"start-{options.weights}", {"options": vars(options), "runs": runs})


if __name__ == "__main__":
    main()
