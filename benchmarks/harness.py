"""Times one call against the machine's own ceilings (docs/ARCHITECTURE.md).

A benchmark file builds `Case` objects and hands them to `main`. Every case is checked before it is
timed: a result outside the tests' tolerance policy is an error, not a number. Peaks are measured
first, in the same process, because a shared machine's ceiling moves from hour to hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

from qwen_native import _C, ops  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
MINIMUM_REPEATS = 30
MAXIMUM_COPIES = 64


@dataclasses.dataclass
class Run:
    """One set of buffers: what is timed, and how its result is checked."""

    native: Callable[[], Any]
    torch: Callable[[], Any] | None
    check: Callable[
        [Any], None
    ]  # raises AssertionError when native()'s result is not accurate enough


@dataclasses.dataclass
class Case:
    """One op at one shape.

    Attributes:
        op: name of the op, as everywhere in the project.
        label: shape, dtype and format, e.g. "tokens=1 3584x18944 int4".
        make: builds fresh buffers.
        bytes: read plus written by one call, each once.
        operations: multiply-adds count twice; 0 for ops bound by memory.
        peak: the ceiling that bounds the op: a key of `_C.measure_peaks`, e.g. "read_bandwidth",
        "tile_int8".
            When the active level lacks it (0), the level's "dot_int8", "dot_bf16" or "fma_f32" is
            used and named in the output.
    """

    op: str
    label: str
    make: Callable[[], Run]
    bytes: int
    operations: int = 0
    peak: str = "read_bandwidth"


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB when the system does not say."""
    text = subprocess.run(
        ["getconf", "LEVEL3_CACHE_SIZE"], capture_output=True, text=True
    ).stdout.strip()
    return int(text) if text.isdigit() and int(text) > 0 else 32 << 20


def machine() -> dict[str, Any]:
    """Processor, commit and date that a result belongs to."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    return {
        "cpu": model.group(1) if model else platform.processor(),
        "commit": git("rev-parse", "--short=12", "HEAD")
        + ("-dirty" if git("status", "--porcelain", "-uno") else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "last_level_cache": cache_bytes(),
    }


def store(name: str, record: dict[str, Any]) -> None:
    """Write a record, and what machine it is from, to results/NAME-DATE-TIME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps({"machine": machine(), **record}, indent=1) + "\n")
    print(f"written to {path}")


def _sample(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds of each call; consecutive calls use different buffers."""
    for call in calls[:3]:
        call()
    seconds = []
    for i in range(repeats):
        call = calls[i % len(calls)]
        start = time.perf_counter_ns()
        call()
        seconds.append((time.perf_counter_ns() - start) * 1e-9)
    return sorted(seconds)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def _ceiling(case: Case, peaks: dict[str, Any]) -> str:
    for name in (case.peak, case.peak.replace("tile", "dot"), "fma_f32"):
        if peaks[name] > 0:
            return name
    raise ValueError(f"no peak was measured for {case.peak!r}")


def measure(case: Case, peaks: dict[str, Any], repeats: int, hot: bool) -> dict[str, Any]:
    """Check and time one case.

    Returns:
        op, label, isa, seconds (median), p10, p90, gb_per_s, gflops, peak (name of the ceiling),
        peak_share, torch_seconds and torch_ratio (torch's time / ours; None without a torch
        counterpart), and `cache`: "cold" when the rotated buffers exceed twice the last-level
        cache, "rotated" when that would take more than 64 copies, "hot" when asked for.

    Raises:
        AssertionError: the result is not within the tolerance policy.
    """
    copies = 1 if hot else min(MAXIMUM_COPIES, 1 + 2 * cache_bytes() // max(case.bytes, 1))
    runs = [case.make() for _ in range(copies)]
    runs[0].check(runs[0].native())
    ordered = _sample([run.native for run in runs], repeats)
    median = statistics.median(ordered)
    theirs = [run.torch for run in runs if run.torch is not None]
    torch_median = statistics.median(_sample(theirs, repeats)) if theirs else None
    ceiling = _ceiling(case, peaks)
    rate = (case.bytes if ceiling == "read_bandwidth" else case.operations) / median
    cold = copies * case.bytes > 2 * cache_bytes()
    return {
        "op": case.op,
        "label": case.label,
        "isa": peaks["isa"],
        "seconds": median,
        "p10": _quantile(ordered, 0.1),
        "p90": _quantile(ordered, 0.9),
        "gb_per_s": case.bytes / median / 1e9,
        "gflops": case.operations / median / 1e9,
        "peak": ceiling,
        "peak_share": rate / peaks[ceiling],
        "torch_seconds": torch_median,
        "torch_ratio": torch_median / median if torch_median else None,
        "cache": "hot" if hot else "cold" if cold else "rotated",
    }


def _row(result: dict[str, Any]) -> str:
    ratio = f"{result['torch_ratio']:6.2f}x" if result["torch_ratio"] else "      -"
    return (
        f"{result['op']:12} {result['label']:30} {result['isa']:7} "
        f"{result['seconds'] * 1e6:10.1f} us "
        f"({result['p10'] * 1e6:.1f} .. {result['p90'] * 1e6:.1f})  {result['gb_per_s']:6.1f} GB/s "
        f"{result['gflops']:8.1f} GFLOP/s  {result['peak_share']:6.1%} of {result['peak']:14} "
        f"torch {ratio}  {result['cache']}"
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser(description: str, ops_available: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python benchmarks/kernels.py                         every op at the best level\n"
        "  python benchmarks/kernels.py rms_norm rope --isa all two ops, every level of this host\n"
        "  python benchmarks/kernels.py --threads 1 --hot       one thread, data in cache\n"
        "  python benchmarks/kernels.py --save                  write benchmarks/results/*.json\n"
        "  python benchmarks/kernels.py --json - --quiet        JSON on standard output only",
    )
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="op",
        help=f"ops to run (default: all): {', '.join(ops_available)}",
    )
    parser.add_argument(
        "--isa", default="", help="levels, comma-separated, or 'all' (default: the active one)"
    )
    parser.add_argument(
        "--threads", type=int, default=_C.op_threads(), help="threads for us and for torch"
    )
    parser.add_argument("--match", default="", help="only cases whose label contains this text")
    parser.add_argument(
        "--repeats", type=int, default=50, help=f"calls timed per case, at least {MINIMUM_REPEATS}"
    )
    parser.add_argument(
        "--hot", action="store_true", help="call on one set of buffers instead of rotating them"
    )
    parser.add_argument("--save", action="store_true", help="write the JSON to benchmarks/results/")
    parser.add_argument(
        "--json", metavar="FILE", help="write the JSON to FILE ('-' = standard output)"
    )
    parser.add_argument("--quiet", action="store_true", help="no table")
    return parser


def main(description: str, cases: Sequence[Case], argv: Sequence[str] | None = None) -> int:
    """Run the command line of a benchmark file.

    Returns:
        0; 1 when a case failed its tolerance check (the others are still measured, nothing is
        saved); 2 for bad arguments.
    """
    names = sorted({case.op for case in cases})
    parser = _parser(description, names)
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.ops if name not in names]:
        parser.error(f"op is {unknown[0]!r}, expected one of {', '.join(names)}")
    if arguments.repeats < MINIMUM_REPEATS:
        parser.error(f"--repeats is {arguments.repeats}, expected at least {MINIMUM_REPEATS}")
    before = _C.active_isa()
    isas = ops.available_isas() if arguments.isa == "all" else (arguments.isa or before).split(",")
    if unknown := [isa for isa in isas if isa not in ops.available_isas()]:
        parser.error(f"--isa is {unknown[0]!r}, expected one of {', '.join(ops.available_isas())}")
    chosen = [
        case
        for case in cases
        if (not arguments.ops or case.op in arguments.ops) and arguments.match in case.label
    ]
    say = (lambda text: None) if arguments.quiet else _say
    torch.set_num_threads(arguments.threads)
    threads_before = _C.op_threads()
    _C.set_op_threads(arguments.threads)
    report: dict[str, Any] = {**machine(), "threads": arguments.threads, "peaks": [], "results": []}
    failed = False
    try:
        for isa in isas:
            _C.set_isa(isa)
            peaks = _C.measure_peaks(arguments.threads)
            report["peaks"].append(peaks)
            rates = ", ".join(
                f"{k} {v / 1e9:.1f} G/s" for k, v in peaks.items() if isinstance(v, float) and v
            )
            say(f"{isa}, {arguments.threads} threads: {rates}")
            for case in chosen:
                try:
                    result = measure(case, peaks, arguments.repeats, arguments.hot)
                except AssertionError as error:
                    failed = True
                    sys.stderr.write(
                        f"{case.op} {case.label} {isa}: WRONG RESULT, not reported: {error}\n"
                    )
                    continue
                report["results"].append(result)
                say(_row(result))
    finally:
        _C.set_isa(before)
        _C.set_op_threads(threads_before)
    text = json.dumps(report, indent=1) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    elif arguments.json:
        Path(arguments.json).write_text(text)
    if arguments.save and not failed:
        slug = re.sub(r"[^a-z0-9]+", "-", report["cpu"].lower()).strip("-")
        path = RESULTS / f"{slug}-{report['commit']}.json"
        RESULTS.mkdir(exist_ok=True)
        path.write_text(text)
        say(f"saved {path}")
    return 1 if failed else 0
