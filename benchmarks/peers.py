"""qwen_native beside llama.cpp and OpenVINO GenAI: the same weights, machine and minutes.

Nothing is installed from here. llama.cpp comes from llama-cpp-python, built with clang so that it
uses AMX where the host has it; OpenVINO needs optimum-intel to convert the checkpoint, which may
live in an environment of its own (it asks for older versions of transformers):

    apt-get install clang-16
    CC=clang-16 CXX=clang++-16 CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=OFF" \\
        pip install --no-binary llama-cpp-python llama-cpp-python
    pip install openvino-genai
    python -m venv ov && ov/bin/pip install optimum-intel nncf openvino

Then, for the demo model and for a random Qwen-1.8B:

    python benchmarks/peers.py --prompt 512,2048 --depth 0,4096 --batch 1,16 \\
        --optimum ov/bin/optimum-cli
    python benchmarks/peers.py --random 1.8b --weights int8 --prompt 512 --gen 16
    python benchmarks/peers.py --random 1.8b --kv-dtype int8 --depth 4096 --gen 16 --rounds 3
    python benchmarks/peers.py --quality --json --plot peers.png

All engines are loaded once; every round measures each in turn, so that all see the same
disturbances; our share of the memory's bandwidth is that of what it gave the second before.
llama.cpp's weights are requantised from the same file (Q4_0 for int4, Q8_0 for int8), OpenVINO's
from its float values. Prints medians, our spread, and the medians of the ratios; --json writes
everything to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from engines import LLAMA_TYPES, Engine, LlamaCpp, Native, OnItsThread, OpenVino
from harness import store
from random_model import SHAPES, random_model

from qwen_native import _C, LLM
from qwen_native.hub import resolve_model
from qwen_native.quantize import Sample

PEERS = {"llama.cpp": "llama_cpp", "openvino": "openvino_genai"}
QUALITY_WINDOWS, QUALITY_LENGTH = 6, 512


def load_peers(path: Path, options: argparse.Namespace, longest: int, most: int) -> list[Engine]:
    """The peers that were asked for; by default those that are installed."""
    installed = [name for name, module in PEERS.items() if importlib.util.find_spec(module)]
    wanted = options.peers.split(",") if options.peers else installed
    for name in wanted:
        if name not in PEERS:
            sys.exit(f"peers.py: peer is {name!r}, expected one of {', '.join(PEERS)}")
        if name not in installed:
            sys.exit(f"peers.py: {name} is not installed.\n{__doc__}")
    peers: list[Engine] = []
    if "llama.cpp" in wanted:
        file = LlamaCpp.requantised(path, options.weights)
        peers.append(
            OnItsThread(lambda: LlamaCpp(file, options.weights, options.threads, longest, most))
        )
    if "openvino" in wanted:
        folder = OpenVino.exported(path, options.weights, options.optimum)
        peers.append(OnItsThread(lambda: OpenVino(folder, options.weights, options.threads)))
    for name in PEERS.keys() - set(wanted):
        print(f"without {name}")
    return peers


class BenchmarkCase(NamedTuple):
    """`tokens` of a prompt, or steps of `batch` sequences with `depth` tokens in the cache."""

    kind: str  # "prefill" or "decode"
    tokens: int
    depth: int
    batch: int

    def seconds(self, engine: Engine) -> float | None:
        if self.kind == "prefill":
            return engine.prefill_seconds(self.tokens)
        if self.batch > 1:
            return engine.batch_seconds(self.tokens, self.batch)
        return engine.decode_seconds(self.tokens, self.depth)


def measure(
    ours: Native, peers: Sequence[Engine], case: BenchmarkCase, rounds: int
) -> dict[str, Any]:
    """Tokens per second of every engine over `rounds`, measured in turn."""
    engines: list[Engine] = [ours, *peers]
    engines = [engine for engine in engines if case.seconds(engine) is not None]  # and warms up
    times: dict[str, list[float]] = {engine.name: [] for engine in engines}
    bandwidths = []  # of memory, beside our own times
    for _ in range(rounds):
        if case.kind == "decode":
            bandwidths.append(_C.measure_peaks(ours.llm.threads)["read_bandwidth"])
        for engine in engines:
            times[engine.name].append(case.seconds(engine) or 0.0)
    mine = times[ours.name]
    tokens = case.tokens * case.batch
    row = ours.benchmark.measurement(*case, mine, bandwidths).to_json()
    row["read_bandwidths"] = bandwidths
    row["engines"] = {
        name: {
            "tokens_per_second": statistics.median(tokens / t for t in all_times),
            "all": [tokens / t for t in all_times],
            "ratio": statistics.median(t / own for t, own in zip(all_times, mine, strict=True)),
        }
        for name, all_times in times.items()
    }
    return row


def print_row(row: dict[str, Any], names: Sequence[str]) -> None:
    label = (
        f"prefill {row['tokens']}"
        if row["kind"] == "prefill"
        else f"decode {row['tokens']}, depth {row['depth']}, batch {row['batch']}"
    )
    cells = [f"{label:34}{row['engines'][names[0]]['tokens_per_second']:9.1f}"]
    cells.append(f"{row['spread']:6.0%}{row['bandwidth_share']:7.0%}{row['peak_share']:6.0%}")
    for name in names[1:]:
        of = row["engines"].get(name)
        cells.append(
            f"{of['tokens_per_second']:11.1f}{of['ratio']:8.2f}x" if of else f"{'-':>11}{'':9}"
        )
    print("".join(cells), flush=True)


def quality(path: Path, ours: Native, peers: Sequence[Engine]) -> list[dict[str, Any]]:
    """Mean KL divergence from float32, changed most probable tokens and perplexity, on the second
    halves of windows of text that no calibration has seen; ours as prompts and as single steps.
    """
    tokenizer = ours.llm.tokenizer
    if tokenizer is None:
        sys.exit(f"peers.py: {path} has no tokenizer, expected one for --quality")
    text = Sample.default().held_out
    assert isinstance(text, str)
    ids = np.array(tokenizer.encode(text)[: QUALITY_WINDOWS * QUALITY_LENGTH])
    windows = ids.reshape(-1, QUALITY_LENGTH)
    last = QUALITY_LENGTH // 2
    full = LLM(path, weights="f32", threads=ours.llm.threads, packed_cache=False)
    exact = [log_softmax(full.logits(window.tolist(), last=last)) for window in windows]
    del full

    rows = []

    def judge(name: str, bits: float, logits: Iterable[npt.NDArray[Any]]) -> None:
        divergence, flips, likelihood = [], [], []
        for window, p, approximate in zip(windows, exact, logits, strict=True):
            q = log_softmax(approximate[:, : p.shape[1]])
            divergence.append((np.exp(p) * (p - q)).sum(-1))
            flips.append(p.argmax(-1) != q.argmax(-1))
            targets = window[-last + 1 :]
            likelihood.append(q[np.arange(last - 1), targets])
        row = {
            "name": name,
            "bits_per_weight": bits,
            "mean_kl": float(np.mean(divergence)),
            "top1_flips": float(np.mean(flips)),
            "perplexity": float(np.exp(-np.mean(likelihood))),
        }
        rows.append(row)
        print(
            f"{name:34}{bits:9.2f}{row['mean_kl']:10.4f}{row['top1_flips']:8.1%}"
            f"{row['perplexity']:12.3f}",
            flush=True,
        )

    weights = sum(count for count, _ in ours.llm.model.bytes_by_format.values())
    print(f"\n{'quality':34}{'bits':>9}{'mean KL':>10}{'flips':>8}{'perplexity':>12}")
    bits = 8 * ours.file_bytes / weights
    texts = [window.tolist() for window in windows]
    steps = (ours.logits_of_single_steps(ids, last) for ids in texts)
    judge("float32", 32, exact)
    judge(f"{ours.name}, prompts", bits, (ours.logits(ids, last) for ids in texts))
    judge(f"{ours.name}, single steps", bits, steps)
    for peer in peers:
        bits = 8 * peer.file_bytes / weights
        judge(peer.name, bits, (peer.logits(ids, last) for ids in texts))
    return rows


def log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def plot(rows: Sequence[dict[str, Any]], names: Sequence[str], target: Path) -> None:
    """Tokens per second against prompt length, depth and batch, one panel each."""
    from matplotlib.figure import Figure

    prefills = [r for r in rows if r["kind"] == "prefill"]
    decodes = [r for r in rows if r["kind"] == "decode"]
    panels = [
        ("prompt tokens", "tokens", prefills),
        ("tokens in the cache", "depth", [r for r in decodes if r["batch"] == 1]),
        ("sequences together", "batch", [r for r in decodes if r["depth"] == 0]),
    ]
    panels = [panel for panel in panels if panel[2]]
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, (label, key, points) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for name in names:
            known = [r for r in points if name in r["engines"]]
            axes.plot(
                [r[key] for r in known],
                [r["engines"][name]["tokens_per_second"] for r in known],
                marker="o",
                label=name,
            )
        axes.set(xlabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("tokens per second")
    figure.axes[0].legend()
    figure.savefig(target, dpi=120)
    print(target)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a .gguf file; default: the demo model")
    parser.add_argument("--random", choices=sorted(SHAPES), help="random weights of this shape")
    parser.add_argument("--weights", choices=sorted(LLAMA_TYPES), default="int4")
    parser.add_argument("--kv-dtype", default="auto", help="our KV cache; theirs is f16 or u8")
    parser.add_argument("--peers", help="llama.cpp,openvino; default: those that are installed")
    parser.add_argument("--optimum", default="optimum-cli", help="converts for OpenVINO")
    parser.add_argument("--threads", type=int, default=_C.thread_budget()["threads"])
    parser.add_argument("--prompt", default="512", help="prompt lengths, e.g. 512,2048")
    parser.add_argument("--gen", type=int, default=64, help="tokens generated per decode case")
    parser.add_argument("--depth", default="0", help="cache depths of the decode, e.g. 0,4096")
    parser.add_argument("--batch", default="1", help="sequences decoded together, e.g. 1,4,16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quality", action="store_true", help="also KL, flips and perplexity")
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/peers-*.json")
    parser.add_argument("--plot", type=Path, help="a PNG of tokens per second")
    options = parser.parse_args(argv)

    path = random_model(options.random) if options.random else resolve_model(options.model)
    prompts, depths, batches = (
        [int(n) for n in text.split(",") if n]
        for text in (options.prompt, options.depth, options.batch)
    )
    most, gen = max(batches, default=1), options.gen
    longest = max([*prompts, *(depth + gen for depth in depths), most * gen, QUALITY_LENGTH]) + 64
    ours = Native(path, options.weights, options.kv_dtype, options.threads)
    peers = load_peers(path, options, longest, most)
    names = [ours.name, *(peer.name for peer in peers)]

    heads = "".join(f"{name:>12}{'ratio':>8}" for name in names[1:])
    print(f"{'tokens per second':34}{'ours':>9}{'±':>6}{'memory':>7}{'peak':>6}{heads}")
    rows = []
    cases = [BenchmarkCase("prefill", n, 0, 1) for n in prompts]
    cases += [BenchmarkCase("decode", gen, depth, 1) for depth in depths]
    cases += [BenchmarkCase("decode", gen, 0, batch) for batch in batches if batch > 1]
    for case in cases:
        row = measure(ours, peers, case, options.rounds)
        print_row(row, names)
        rows.append(row)
    judged = quality(path, ours, peers) if options.quality else []
    if options.plot:
        plot(rows, names, options.plot)
    if options.json:
        record = {
            "isa": _C.active_isa(),
            "threads": options.threads,
            "model": path.name,
            "weights": options.weights,
            "kv_dtype": ours.llm.kv_dtype,
            "bytes_by_format": ours.llm.model.bytes_by_format,
            "bytes_per_token": ours.benchmark.weight_bytes(),
            "peaks": ours.benchmark.peaks,
            "results": rows,
            "quality": judged,
        }
        model = options.random or ("demo" if options.model is None else path.stem)
        store(f"peers-{model}-{options.weights}", record)


if __name__ == "__main__":
    main()
