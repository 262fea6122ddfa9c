"""Random checkpoint tensors of every source type, and their values by the gguf package."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

SOURCES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
# Where each block keeps its binary16 scales.
_HALVES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
}


def block(source: str) -> tuple[int, int]:
    """Elements and bytes of one block."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[source]]


def random_tensor(
    source: str, rows: int, cols: int, rng: np.random.Generator, scale: float = 0.01
) -> np.ndarray:
    """Bytes [n], uint8: random codes, and finite random scales of both signs around `scale`."""
    if source in ("F32", "F16", "BF16"):
        values = (rng.standard_normal((rows, cols)) * scale).astype(np.float32)
        if source == "BF16":
            return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8).reshape(-1)
        return values.astype({"F32": np.float32, "F16": np.float16}[source]).view(np.uint8).ravel()
    elements, size = block(source)
    assert cols % elements == 0
    blocks = rng.integers(0, 256, (rows * cols // elements, size), np.uint8)
    for at in _HALVES[source]:
        halves = (rng.standard_normal((len(blocks), 1)) * scale).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8)
    return blocks.reshape(-1)


def decoded(data: np.ndarray, source: str, rows: int, cols: int) -> np.ndarray:
    """The tensor's values by the gguf package: [rows, cols], float32."""
    kind = GGMLQuantizationType[source]
    return dequantize(data.reshape(rows, -1), kind).astype(np.float32).reshape(rows, cols)
