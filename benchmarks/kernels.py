"""Time every op at the sizes of real models, against the machine's peaks and against torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness  # noqa: E402
import numpy as np  # noqa: E402
import quant_reference  # noqa: E402
import torch  # noqa: E402
from gguf_blocks import block, decoded, random_tensor  # noqa: E402
from harness import Case, Run  # noqa: E402
from tolerance import assert_contraction, assert_pointwise  # noqa: E402

from qwen_native import ops  # noqa: E402

HIDDEN, INTER = 3584, 18944  # Qwen2.5-7B


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


def rms_norm_cases() -> Iterator[Case]:
    def make(tokens: int, dtype: torch.dtype) -> Run:
        x, weight = torch.randn(tokens, HIDDEN).to(dtype), torch.randn(HIDDEN)

        def check(out: torch.Tensor) -> None:
            wide = x.double()
            ref = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
            assert_pointwise(out, ref, plain())

        def plain() -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (HIDDEN,), weight.to(dtype), 1e-6)

        return Run(lambda: ops.rms_norm(x, weight), plain, check)

    for tokens in (1, 512):
        for dtype in (torch.float32, torch.bfloat16):
            size = 2 * tokens * HIDDEN * dtype.itemsize + 4 * HIDDEN
            yield Case(
                "rms_norm",
                f"{tokens}x{HIDDEN} {_name(dtype)}",
                lambda t=tokens, d=dtype: make(t, d),
                size,
            )


def linear_float_cases() -> Iterator[Case]:
    def make(tokens: int, rows: int, cols: int, dtype: torch.dtype) -> Run:
        x, weight = torch.randn(tokens, cols), torch.randn(rows, cols).to(dtype)
        narrow = x.to(dtype)

        def check(out: torch.Tensor) -> None:
            assert_contraction(out, x.double() @ weight.double().T, plain().float())

        def plain() -> torch.Tensor:
            return torch.nn.functional.linear(narrow, weight)

        return Run(lambda: ops.linear(x, weight), plain, check)

    shapes = [
        (9728, 896),
        (896, 4864),
        (11008, 2048),
    ]  # Qwen2.5-0.5B gate + up, down; 1.8B gate + up
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 16, 512):
            for rows, cols in shapes:
                yield Case(
                    "linear",
                    f"tokens={tokens} {rows}x{cols} {_name(dtype)}",
                    lambda t=tokens, r=rows, c=cols, d=dtype: make(t, r, c, d),
                    rows * cols * dtype.itemsize + 4 * tokens * (rows + cols),
                    2 * tokens * rows * cols,
                    "read_bandwidth"
                    if tokens == 1
                    else ("fma_f32" if dtype == torch.float32 else "tile_bf16"),
                )


def quantize_cases() -> Iterator[Case]:
    """Loading: a checkpoint's blocks to the engine's formats."""

    def make(source: str, rows: int, cols: int, fmt: str) -> Run:
        data = random_tensor(source, rows, cols, np.random.default_rng(1))
        values = decoded(data, source, rows, cols).astype(np.float64)

        def check(packed: ops.PackedWeight) -> None:
            wide = quant_reference.decode(fmt, packed.data, rows, cols)
            relative = np.sqrt(np.square(wide - values).sum() / np.square(values).sum())
            # tests/kernels/test_quantize.py derives these; uniform codes are easier than Gaussian.
            limit = {"int8": 0.006, "int4_symmetric": 0.083, "int4": 0.072}[fmt]
            assert relative <= limit, f"relative error {relative:.4f}, limit {limit}"

        return Run(lambda: ops.pack_weight(data, source, (rows, cols), fmt), None, check)

    rows, cols = 896, 4864  # Qwen2.5-0.5B down
    for source, fmt in (
        *(("Q8_0", "int8"), ("Q5_0", "int8"), ("Q6_K", "int8"), ("Q4_K", "int8"), ("BF16", "int8")),
        *(("Q4_0", "int4_symmetric"), ("BF16", "int4_symmetric"), ("BF16", "int4")),
    ):
        elements, size = block(source)
        bytes_read = rows * cols // elements * size
        yield Case(
            "quantize",
            f"{rows}x{cols} {source} to {fmt}",
            lambda s=source, f=fmt: make(s, rows, cols, f),
            bytes_read + quant_reference.packed_bytes(fmt, rows, cols),
        )


CASES = [*linear_float_cases(), *rms_norm_cases(), *quantize_cases()]

if __name__ == "__main__":
    sys.exit(harness.main(__doc__ or "", CASES))
