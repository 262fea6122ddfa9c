"""Decode on a share of the machine: under a CPU quota of one core, beside a busy core, and idle.

    python benchmarks/quota.py --weights int4

Every round measures in turn, with the same model:

    one thread, nothing else       what one core gives: the fair share of a quota of one core
    all threads, nothing else
    one thread, quota of one core  what `LLM` does under a quota, whose threads follow from it
    all threads, quota of one core what a caller gets who asks for more threads than the quota has
    all threads, one core busy     a process spins on the last CPU; half of that CPU is still ours

and, with nothing to do, the CPU time that the pool's threads use. The quota is a cgroup of our own
(version 1 or 2), which takes the right to make one; without it those rows are missing and it says
so. Ratios are medians over rounds of what was measured in the same round. --json writes everything
to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from harness import store

from qwen_native import _C, LLM

PERIOD = 100_000  # microseconds, the kernel's default
GOAL = 0.85  # of the fair share


class Quota:
    """A cgroup beside ours that grants one core; this process moves in and out of it."""

    def __init__(self) -> None:
        self.home, self.version = _cpu_cgroup()
        self.path = self.home / f"qn-quota-{os.getpid()}"
        self.path.mkdir()
        try:
            if self.version == 1:
                (self.path / "cpu.cfs_period_us").write_text(str(PERIOD))
                (self.path / "cpu.cfs_quota_us").write_text(str(PERIOD))
            else:
                (self.path / "cpu.max").write_text(f"{PERIOD} {PERIOD}")
        except OSError:
            self.path.rmdir()
            raise

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self.home / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        self.path.rmdir()


def _cpu_cgroup() -> tuple[Path, int]:
    """Folder of this process's cgroup with the cpu controller, and the cgroup version."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            return Path("/sys/fs/cgroup/cpu") / path.lstrip("/"), 1
    return Path("/sys/fs/cgroup") / path.lstrip("/"), 2


class BusyCore:
    """A process that spins on one CPU while the context is open."""

    def __init__(self, cpu: int) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        os.sched_setaffinity(self.process.pid, {cpu})
        self.process.send_signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Decoder:
    """An engine with its own number of threads on a shared model."""

    def __init__(self, llm: LLM, threads: int) -> None:
        self.engine = _C.Engine(
            llm.model, threads=threads, context=1024, cache_tokens=1024, kv_dtype=llm.kv_dtype
        )

    def run(self, tokens: int) -> tuple[float, float]:
        """Tokens per second, and CPU seconds of the process per second."""
        greedy = _C.SamplingParams(temperature=0.0)
        request = self.engine.add([1], greedy, max_new_tokens=tokens + 1, stop_ids=[])
        self.engine.step()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(tokens):
            self.engine.step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.engine.abort(request)
        return tokens / wall, cpu / wall


def idle_cpu(decoder: Decoder, seconds: float) -> float:
    """CPU seconds per second of a process whose engine has just worked and has nothing to do."""
    decoder.run(4)
    before = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - before) / seconds


def main() -> int:
    """Measure, print the table, return 1 when a share is below the goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, .gguf file or id; default: the demo model")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    llm = LLM(options.model, weights=options.weights, threads=options.threads, context=1024)
    one, all_threads = Decoder(llm, 1), Decoder(llm, options.threads)

    free = contextlib.nullcontext
    cases: dict[str, tuple[Decoder, Callable[[], contextlib.AbstractContextManager[None]]]] = {
        "one thread": (one, free),
        "all threads": (all_threads, free),
    }
    with contextlib.ExitStack() as stack:
        try:
            quota = Quota()
            stack.callback(quota.close)
            cases["one thread, quota of one core"] = (one, quota)
            cases["all threads, quota of one core"] = (all_threads, quota)
        except OSError as error:
            print(f"quota.py: no cgroup, so no quota is measured: {error}")
        busy = BusyCore(max(os.sched_getaffinity(0)))
        stack.callback(busy.close)
        cases["all threads, one core busy"] = (all_threads, busy)

        one.run(4), all_threads.run(4)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for _ in range(options.rounds):
            for name, (decoder, condition) in cases.items():
                with condition():
                    runs[name].append(decoder.run(options.tokens))
        idle = idle_cpu(all_threads, 1.0)

    print(f"{options.weights}, {options.threads} threads, {options.tokens} tokens, medians")
    print(f"{'':34}{'tokens/s':>9}{'CPUs used':>11}{'of one thread alone':>21}")
    shares = {}
    alone = runs["one thread"]
    for name, results in runs.items():
        ratios = [speed / base for (speed, _), (base, _) in zip(results, alone, strict=True)]
        shares[name] = statistics.median(ratios)
        speed, cpus = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"{name:34}{speed:9.1f}{cpus:11.2f}{shares[name]:20.2f}x")
    print(f"{'idle':34}{'':9}{idle:11.3f}")
    if options.json:
        record = {"options": vars(options), "runs": runs, "idle": idle}
        store(f"quota-{options.weights}", record)
    judged = [share for name, share in shares.items() if "quota" in name or "busy" in name]
    return 0 if min(judged) >= GOAL and idle < 0.05 else 1


if __name__ == "__main__":
    sys.exit(main())
