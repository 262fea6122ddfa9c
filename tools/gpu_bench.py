#!/usr/bin/env python3
"""Measure the CUDA kernels on a GPU, beside its own bandwidth and matrix peak and beside torch.

4-bit products stand beside torchao's and Marlin's too, where these are installed.

Uses the libraries of tests/ for structs and memory. Part of tools/gpu_check.sh.

usage: gpu_bench.py LIBRARY MODEL OUT.json OUT.md [--checks FILE] [--dry-run]
  LIBRARY        libqn_cuda.so
  MODEL          what to generate with, as for LLM; "demo" for the demo model
  --checks FILE  lines "name<TAB>result" for the head of the report
  --dry-run      small shapes, once each, to try this script out under the simulator
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from cuda_gpu import Gpu  # noqa: E402
from cuda_simulator import Buffer, dtype_value, struct  # noqa: E402

from qwen_native import _C, LLM  # noqa: E402

LAYER = (4096, 4096)  # rows and columns of the GEMMs' weight
CACHED = 256 << 20  # bytes of weights that no L2 cache holds
HEADS, KV_HEADS, HEAD_DIM, PAGE_SHIFT = 32, 8, 128, 6


@dataclass
class Row:
    """One case; shares are of what this GPU was measured to do."""

    kernel: str
    case: str
    microseconds: float
    gigabytes_per_second: float
    bandwidth_share: float
    teraflops: float
    peak_share: float | None
    torch_microseconds: float | None
    int4_microseconds: dict[str, float]  # of other 4-bit kernels, by name


class Bench:
    """A GPU, its measured peaks and the rows so far."""

    def __init__(self, library: Path, dry: bool) -> None:
        self.gpu = Gpu(library)
        self.dry = dry
        self.facts = _C.Gpu(str(library)).info()
        self.device = struct("DeviceInfo")(multiprocessors=self.facts["multiprocessors"])
        self.with_torch = torch.cuda.is_available() and not dry
        self.rows: list[Row] = []
        self.bandwidth = self._bandwidth()
        self.peak = self._matrix_peak()
        self.int4_layers = int4_layers() if self.with_torch else {}

    def seconds(self, run: Callable[[int], None]) -> float:
        """Median seconds of one of the calls run(0), run(1), ... that are queued together."""
        calls, repeats = (1, 1) if self.dry else (50, 7)
        times = []
        for _ in range(repeats + 1):
            self.gpu.library.sync()
            begin = time.perf_counter()
            for call in range(calls):
                run(call)
            self.gpu.library.sync()
            times.append((time.perf_counter() - begin) / calls)
        return statistics.median(times[1:])

    def _bandwidth(self) -> float:
        """Bytes per second of a copy within the device, read and written."""
        size = 1 << 20 if self.dry else 1 << 30
        a, b = (self.gpu.empty((size,), torch.uint8) for _ in range(2))
        stream = ctypes.c_void_p(self.gpu.stream)
        copy = self.gpu.library.qn_gpu_copy
        to, source = ctypes.c_void_p(a.pointer), ctypes.c_void_p(b.pointer)
        seconds = self.seconds(lambda _: copy(to, source, ctypes.c_size_t(size), stream))
        self.gpu.reset()
        return 2 * size / seconds

    def _matrix_peak(self) -> float | None:
        """bf16 operations per second of torch's largest matrix product."""
        if not self.with_torch:
            return None
        n = 8192
        a, b = (torch.randn((n, n), device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return 2 * n**3 / self.torch_seconds(lambda: a @ b)

    def torch_seconds(self, run: Callable[[], object]) -> float:
        for _ in range(3):
            run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 20e3

    def launch(self, name: str, *arguments: Any) -> None:
        """Queues a kernel; nothing is waited for."""
        converted = [
            ctypes.byref(a) if isinstance(a, ctypes.Structure) else ctypes.c_int64(a)
            for a in arguments
        ]
        error = getattr(self.gpu.library, name)(*converted, ctypes.c_void_p(self.gpu.stream))
        self.gpu.library.check(error)

    def add(
        self,
        kernel: str,
        case: str,
        run: Callable[[int], None],
        moved: float,
        operations: float = 0,
        beside: Callable[[], object] | None = None,
        int4: dict[str, Callable[[], object]] | None = None,
    ) -> None:
        """Measures a case that moves and computes so much, beside torch and 4-bit kernels."""
        seconds = self.seconds(run)
        other = self.torch_seconds(beside) if self.with_torch and beside is not None else None
        others = {name: self.torch_seconds(peer) * 1e6 for name, peer in (int4 or {}).items()}
        self.rows.append(
            Row(
                kernel,
                case,
                seconds * 1e6,
                moved / seconds / 1e9,
                moved / seconds / self.bandwidth,
                operations / seconds / 1e12,
                operations / seconds / self.peak if self.peak else None,
                other * 1e6 if other else None,
                others,
            )
        )
        print(f"{kernel:20} {case:28} {seconds * 1e6:10.1f} us")

    def random(self, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Buffer:
        return self.gpu.upload(torch.randn(shape).to(dtype))

    def on_torch(self, *shape: int) -> Any:
        """A tensor for torch's side, where there is one."""
        if not self.with_torch:
            return None
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def rms_norm(bench: Bench, tokens: int, cols: int) -> None:
    x, out = bench.random((tokens, cols)), bench.random((tokens, cols))
    weight = bench.random((cols,))
    dtype = dtype_value(torch.bfloat16)
    args = struct("RmsNormArgs")(
        out=out.pointer, x=x.pointer, weight=weight.pointer, cols=cols, out_stride=cols,
        x_stride=cols, eps=1e-6, dtype=dtype, weight_dtype=dtype,
    )  # fmt: skip
    y, w = bench.on_torch(tokens, cols), bench.on_torch(cols)
    bench.add(
        "rms_norm",
        f"{tokens} x {cols}",
        lambda _: bench.launch("qn_cuda_rms_norm", args, tokens),
        tokens * cols * 4,
        beside=lambda: torch.nn.functional.rms_norm(y, (cols,), w),
    )
    bench.gpu.reset()


def int4_layers() -> dict[str, list[Any]]:
    """Linear layers of torchao and Marlin (IST-DASLab), where they are installed, on the GPU.

    As many as no L2 cache holds, with groups of 128. Marlin takes float16 alone.
    """
    rows, cols = LAYER
    copies = max(1, CACHED // (rows * cols // 2))
    found: dict[str, list[Any]] = {}
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        tiles = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
        found["torchao"] = []
        for _ in range(copies):
            layer = torch.nn.Sequential(torch.nn.Linear(cols, rows, bias=False))
            quantize_(layer.to("cuda", torch.bfloat16), tiles)
            found["torchao"].append(layer)
    if importlib.util.find_spec("marlin_cuda"):  # "marlin" on PyPI is something else
        import marlin

        found["Marlin"] = [marlin.Layer(cols, rows, groupsize=128).cuda() for _ in range(copies)]
        for layer in found["Marlin"]:  # time does not depend on the codes, but it may on NaN
            layer.B.zero_()
            layer.s.fill_(1.0)
    return found


def int4_peers(bench: Bench, tokens: int) -> dict[str, Callable[[], object]]:
    """A product of each library with the next one of its layers."""

    def in_turn(layers: list[Any], x: torch.Tensor) -> Callable[[], object]:
        turn = itertools.cycle(layers)
        return lambda: next(turn)(x)

    x = bench.on_torch(tokens, LAYER[1])
    return {
        name: in_turn(layers, x.half() if name == "Marlin" else x)
        for name, layers in bench.int4_layers.items()
    }


def gemm(bench: Bench, bits: int, tokens: int) -> None:
    """Weights in turn from more memory than the L2 cache holds, as in a model."""
    rows, cols = (256, 256) if bench.dry else LAYER
    code_bytes, groups = rows * cols * bits // 8, cols // 32
    copies = 1 if bench.dry else max(1, CACHED // code_bytes)
    x, out = bench.random((tokens, cols)), bench.random((tokens, rows))
    weight = bench.gpu.upload(torch.randint(0, 120, (copies, code_bytes), dtype=torch.uint8))
    scales = bench.gpu.upload(torch.rand((copies, groups, rows)).half())
    calls = []
    for copy in range(copies):
        args = struct("GemmArgs")(
            out=out.pointer, x=x.pointer, weight=weight.pointer + copy * code_bytes,
            scales=scales.pointer + copy * groups * rows * 2 if bits < 16 else None,
            tokens=tokens, rows=rows, cols=cols, out_stride=rows, x_stride=cols,
            weight_stride=cols, group_size=32, out_dtype=dtype_value(torch.bfloat16),
        )  # fmt: skip
        plan = struct("GemmPlan")()
        library = bench.gpu.library
        library.qn_cuda_gemm_plan(*map(ctypes.byref, (args, bench.device, plan)))
        library.qn_cuda_gemm_workspace.restype = ctypes.c_int64
        size = library.qn_cuda_gemm_workspace(ctypes.byref(plan))
        if copy == 0:
            workspace = bench.gpu.empty((max(size // 4, 4),), torch.float32)
        args.workspace = workspace.pointer
        calls.append(args)
    name = f"gemm_{'bf16' if bits == 16 else f'int{bits}'}"
    y, w = bench.on_torch(tokens, cols), bench.on_torch(16, rows, cols)
    turn = iter(range(1 << 30))
    bench.add(
        name,
        f"{tokens} x {rows} x {cols}",
        lambda call: bench.launch(f"qn_cuda_{name}", calls[call % copies], bench.device),
        code_bytes + (groups * rows * 2 if bits < 16 else 0) + tokens * (rows + cols) * 2,
        2 * tokens * rows * cols,
        beside=lambda: y @ w[next(turn) % 16].T,
        int4=int4_peers(bench, tokens) if bits == 4 else None,
    )
    bench.gpu.reset()


def attention(bench: Bench, sequences: int, queries: int, keys: int) -> None:
    """Decoding with one query per sequence, else the prefill of a prompt."""
    pages = -(-keys // (1 << PAGE_SHIFT))
    page_bytes = KV_HEADS * 2 * HEAD_DIM * 2 << PAGE_SHIFT
    tokens = sequences * queries
    cache = bench.random((sequences * pages, page_bytes // 2))
    table = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
    q, out = (bench.random((tokens, HEADS, HEAD_DIM)) for _ in range(2))
    args = struct("PagedAttentionArgs")(
        out=out.pointer,
        q=q.pointer,
        page_table=bench.gpu.upload(table).pointer,
        query_begin=bench.gpu.upload(
            torch.arange(sequences + 1, dtype=torch.int32) * queries
        ).pointer,
        kv_len=bench.gpu.upload(torch.full((sequences,), keys, dtype=torch.int32)).pointer,
        q_stride=HEADS * HEAD_DIM,
        out_stride=HEADS * HEAD_DIM,
        sequences=sequences,
        page_table_stride=pages,
        max_query_len=queries,
        max_kv_len=keys,
        num_heads=HEADS,
        scale=HEAD_DIM**-0.5,
        kv=struct("KvPages")(
            base=cache.pointer, page_stride=page_bytes, page_shift=PAGE_SHIFT,
            num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, bits=16,
        ),
    )  # fmt: skip
    size = bench.gpu.library.qn_cuda_attention_decode_workspace
    size.restype = ctypes.c_int64
    if bytes_needed := size(ctypes.byref(args)):
        args.workspace = bench.gpu.empty((bytes_needed // 4,), torch.float32).pointer
    name = "attention_decode" if queries == 1 else "attention_prefill"
    a, k, v = (
        bench.on_torch(sequences, heads, length, HEAD_DIM)
        for heads, length in ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys))
    )
    pairs = queries * keys - queries * (queries - 1) / 2
    bench.add(
        name,
        f"{sequences} x {queries} x {keys}",
        lambda _: bench.launch(f"qn_cuda_{name}", args),
        sequences * pages * page_bytes + 2 * tokens * HEADS * HEAD_DIM * 2,
        4 * sequences * HEADS * HEAD_DIM * pairs,
        beside=lambda: torch.nn.functional.scaled_dot_product_attention(
            a, k, v, is_causal=queries > 1, enable_gqa=True
        ),
    )
    bench.gpu.reset()


def generation(bench: Bench, library: str, model: str) -> None:
    """Decoding steps of the whole engine; what moves is the weights."""
    os.environ["QN_CUDA_SIM_LIBRARY"] = library  # "cuda-sim" is the backend with this library
    tokens = 4 if bench.dry else 64
    for weights in ("bf16", "int4"):
        for batch in (1, 16):
            llm = LLM(
                None if model == "demo" else model,
                device="cuda-sim",
                weights=weights,
                context=256,
            )
            draw = {"temperature": 0.0, "ignore_eos": True}
            prompts = [[5 + i] * 3 for i in range(batch)]
            llm.generate(prompts, max_new_tokens=3, **draw)
            times = []
            for length in (1, 1 + tokens):
                begin = time.perf_counter()
                llm.generate(prompts, max_new_tokens=length, **draw)
                times.append(time.perf_counter() - begin)
            seconds = (times[1] - times[0]) / tokens
            moved = llm.model.weight_bytes
            bench.rows.append(
                Row(
                    "generate",
                    f"{weights}, batch {batch}: {batch / seconds:.0f} tokens/s",
                    seconds * 1e6,
                    moved / seconds / 1e9,
                    moved / seconds / bench.bandwidth,
                    0,
                    None,
                    None,
                    {},
                )
            )
            del llm


def markdown(bench: Bench, checks: dict[str, str]) -> str:
    def percent(share: float | None) -> str:
        return "" if share is None else f"{share:.0%}"

    lines = [
        f"{bench.facts['name']}: copies at {bench.bandwidth / 1e9:.0f} GB/s"
        + (f", torch.matmul at {bench.peak / 1e12:.0f} Tflop/s" if bench.peak else ""),
        "",
        *[f"- {name}: {result}" for name, result in checks.items()],
        "",
        "| kernel | case | µs | GB/s | of bandwidth | Tflop/s | of peak | torch µs | int4 µs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in bench.rows:
        other = "" if row.torch_microseconds is None else f"{row.torch_microseconds:.1f}"
        int4 = ", ".join(f"{name} {value:.1f}" for name, value in row.int4_microseconds.items())
        lines.append(
            f"| {row.kernel} | {row.case} | {row.microseconds:.1f} "
            f"| {row.gigabytes_per_second:.0f} | {percent(row.bandwidth_share)} "
            f"| {row.teraflops:.1f} | {percent(row.peak_share)} | {other} | {int4} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    for name in ("library", "model", "json", "markdown"):
        parser.add_argument(name)
    parser.add_argument("--checks", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    checks = {}
    if options.checks is not None:
        checks = dict(line.split("\t", 1) for line in options.checks.read_text().splitlines())
    bench = Bench(Path(options.library), options.dry_run)
    torch.manual_seed(0)
    rms_norm(bench, 4 if bench.dry else 4096, 4096)
    for bits in (16, 8, 4):
        for tokens in (1, 16) if bench.dry else (1, 16, 64, 512, 4096):
            gemm(bench, bits, tokens)
    shapes = [(1, 1, 4096), (16, 1, 4096), (64, 1, 2048), (1, 4096, 4096), (4, 2048, 2048)]
    for shape in [(2, 1, 70), (1, 70, 70)] if bench.dry else shapes:
        attention(bench, *shape)
    generation(bench, options.library, options.model)
    facts = {
        "gpu": bench.facts,
        "checks": checks,
        "bandwidth": bench.bandwidth,
        "matrix_peak": bench.peak,
        "rows": [asdict(row) for row in bench.rows],
    }
    Path(options.json).write_text(json.dumps(facts, indent=1))
    Path(options.markdown).write_text(markdown(bench, checks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
