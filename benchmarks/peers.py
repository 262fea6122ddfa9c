"""qwen_native beside llama.cpp: the same weights, the same machine, the same minutes.

Needs llama-cpp-python, built with clang so that it uses AMX where the host has it:

    apt-get install clang-16
    CC=clang-16 CXX=clang++-16 CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=OFF" \\
        pip install --no-binary llama-cpp-python llama-cpp-python

Then, for the demo model:

    python benchmarks/peers.py --threads 2 --prompt 512,2048 --gen 64 --depth 0,4096 --batch 16

Both engines are loaded once; every round measures ours and theirs in turn, so that both see the
same disturbances. The weights of the peer are requantised from the same file (Q4_0 for int4, Q8_0
for int8). Prints medians and their ratio; --json writes everything to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, machine

from qwen_native import _C, LLM
from qwen_native.bench import Benchmark
from qwen_native.hub import cache_folder, resolve_model

try:
    import llama_cpp
except ImportError:
    sys.exit(f"peers.py: llama-cpp-python is not installed.\n{__doc__}")

PEER_TYPES = {"int4": "Q4_0", "int8": "Q8_0"}


def peer_file(source: Path, weights: str) -> Path:
    """The checkpoint requantised by llama.cpp, made once beside our cache."""
    target = cache_folder() / f"{source.stem}.{PEER_TYPES[weights].lower()}.gguf"
    if not target.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{PEER_TYPES[weights]}")
        params.allow_requantize = True
        partial = target.with_suffix(".part")
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(partial).encode(), ctypes.byref(params)
        )
        if status != 0:
            sys.exit(f"peers.py: llama.cpp could not requantise {source}, status {status}")
        partial.rename(target)
    return target


class Peer:
    """llama.cpp through its C API, without the Python layer's copies of the logits."""

    def __init__(self, path: Path, threads: int, context: int, sequences: int) -> None:
        """`context` tokens for one sequence, or shared by `sequences` of them."""
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _decode(self, ids: list[int]) -> None:
        for begin in range(0, len(ids), 512):
            chunk = ids[begin : begin + 512]
            array = (llama_cpp.llama_token * len(chunk))(*chunk)
            status = llama_cpp.llama_decode(
                self.context, llama_cpp.llama_batch_get_one(array, len(chunk))
            )
            if status != 0:
                sys.exit(f"peers.py: llama_decode failed with {status}")
        llama_cpp.llama_synchronize(self.context)

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def prefill_seconds(self, tokens: int) -> float:
        ids = np.random.default_rng(tokens).integers(0, self.vocab, tokens).tolist()
        self._clear()
        begin = time.perf_counter()
        self._decode(ids)
        return time.perf_counter() - begin

    def decode_seconds(self, tokens: int, depth: int) -> float:
        ids = np.random.default_rng(0).integers(0, self.vocab, max(depth, 1)).tolist()
        self._clear()
        self._decode(ids)
        begin = time.perf_counter()
        token = ids[-1]
        for _ in range(tokens):
            self._decode([token])
            logits = llama_cpp.llama_get_logits(self.context)
            token = int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())
        return time.perf_counter() - begin

    def batch_seconds(self, tokens: int, sequences: int) -> float:
        """`tokens` steps of that many sequences together, from an empty cache."""
        self._clear()
        batch = llama_cpp.llama_batch_init(sequences, 0, 1)
        batch.n_tokens = sequences
        ids = np.random.default_rng(0).integers(0, self.vocab, sequences).tolist()
        begin = time.perf_counter()
        for position in range(tokens):
            for i in range(sequences):
                batch.token[i] = ids[i]
                batch.pos[i] = position
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = i
                batch.logits[i] = 1
            status = llama_cpp.llama_decode(self.context, batch)
            if status != 0:
                sys.exit(f"peers.py: llama_decode failed with {status}")
            for i in range(sequences):
                logits = llama_cpp.llama_get_logits_ith(self.context, i)
                ids[i] = int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())
        seconds = time.perf_counter() - begin
        llama_cpp.llama_batch_free(batch)
        return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a .gguf file; default: the demo model")
    parser.add_argument("--weights", choices=sorted(PEER_TYPES), default="int4")
    parser.add_argument("--kv-dtype", default="auto", help="our KV cache; theirs is f16")
    parser.add_argument("--threads", type=int, default=_C.thread_budget()["threads"])
    parser.add_argument("--prompt", default="512", help="prompt lengths, e.g. 512,2048")
    parser.add_argument("--gen", type=int, default=64, help="tokens generated per decode case")
    parser.add_argument("--depth", default="0", help="cache depths of the decode, e.g. 0,4096")
    parser.add_argument("--batch", default="", help="sequences decoded together, e.g. 4,16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/peers-*.json")
    options = parser.parse_args(argv)

    path = resolve_model(options.model)
    llm = LLM(path, weights=options.weights, threads=options.threads, kv_dtype=options.kv_dtype)
    ours = Benchmark(llm)
    prompts = [int(n) for n in options.prompt.split(",")]
    depths = [int(n) for n in options.depth.split(",")]
    batches = [int(n) for n in options.batch.split(",") if n]
    most = max(batches, default=1)
    longest = max(*prompts, max(depths) + options.gen, most * options.gen) + 64
    theirs = Peer(peer_file(path, options.weights), options.threads, longest, most)

    cases: list[tuple[str, Any, Any, int]] = [
        (
            f"prefill {n}",
            lambda n=n: ours.prefill_seconds(n),
            lambda n=n: theirs.prefill_seconds(n),
            n,
        )
        for n in prompts
    ]
    cases += [
        (
            f"decode {options.gen} at depth {d}",
            lambda d=d: ours.decode_seconds(options.gen, d, 1),
            lambda d=d: theirs.decode_seconds(options.gen, d),
            options.gen,
        )
        for d in depths
    ]
    cases += [
        (
            f"decode {options.gen}, batch {b}",
            lambda b=b: ours.decode_seconds(options.gen, 0, b),
            lambda b=b: theirs.batch_seconds(options.gen, b),
            options.gen * b,
        )
        for b in batches
    ]
    rows = []
    peer_name = f"llama.cpp {PEER_TYPES[options.weights]}"
    print(f"{'case':28} {'ours t/s':>10} {peer_name + ' t/s':>20} {'ratio':>7}")
    for name, our_seconds, their_seconds, tokens in cases:
        our_seconds(), their_seconds()  # warm up
        pairs = [(our_seconds(), their_seconds()) for _ in range(options.rounds)]
        ours_median = statistics.median(tokens / mine for mine, _ in pairs)
        theirs_median = statistics.median(tokens / other for _, other in pairs)
        ratio = statistics.median(other / mine for mine, other in pairs)
        print(f"{name:28} {ours_median:10.1f} {theirs_median:20.1f} {ratio:7.2f}", flush=True)
        rows.append(
            {
                "case": name,
                "ours": ours_median,
                "peer": theirs_median,
                "ratio": ratio,
                "ours_all": [tokens / mine for mine, _ in pairs],
                "peer_all": [tokens / other for _, other in pairs],
            }
        )
    if options.json:
        record = {
            "machine": machine(),
            "isa": _C.active_isa(),
            "threads": options.threads,
            "weights": options.weights,
            "bytes_by_format": llm.model.bytes_by_format,
            "peer": f"llama-cpp-python {llama_cpp.__version__} {PEER_TYPES[options.weights]}",
            "peaks": ours.peaks,
            "results": rows,
        }
        target = RESULTS / f"peers-{options.weights}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        target.write_text(json.dumps(record, indent=1))
        print(target)


if __name__ == "__main__":
    main()
