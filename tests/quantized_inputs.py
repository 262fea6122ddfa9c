"""Random packed weights with the float64 matrices that they stand for, and activations rounded to
int8 as the kernels round them; for the tests of linear and mlp."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import quant_reference
import torch

from qwen_native import ops


class Weight:
    """A random packed weight and the float64 matrix that it stands for."""

    def __init__(self, rng: torch.Generator, fmt: str, rows: int, cols: int, scale: float = 1.0):
        values = (torch.randn((rows, cols), generator=rng) * scale).numpy()
        parts = quant_reference.quantize(fmt, values)
        self.packed = ops.PackedWeight(quant_reference.pack(fmt, parts), fmt, rows, cols)
        self.values = torch.from_numpy(quant_reference.dequantize(fmt, parts)[:rows, :cols].copy())
        self.fold_step = torch.from_numpy(fold_step(fmt, parts)[:rows])
        self.folded = torch.from_numpy(folded(fmt, parts)[:rows, :cols].copy())


def fold_step(fmt: str, parts: quant_reference.Parts) -> npt.NDArray[np.float64]:
    """What a step of each row's int8 weights is worth in the folded kernels."""
    step = parts.fold_scale.astype(np.float64)
    if fmt != "int4":
        return step
    # A scale in sixteenths of a step has to fit a byte, a min 16 bits with 8 for fractions.
    return np.maximum(step, np.maximum(parts.row_scale * 255 / 15.87, parts.row_min * 1.001))


def folded(fmt: str, parts: quant_reference.Parts) -> npt.NDArray[np.float64]:
    """The weights as int8 with one scale per row; scales of int4 in sixteenths of its step."""
    step = fold_step(fmt, parts)[:, None]
    safe = np.where(step > 0, step, 1.0)
    if fmt != "int4":
        return np.rint(quant_reference.dequantize(fmt, parts) / safe) * step
    scale = (parts.row_scale[:, None] * parts.scale.astype(np.float64) / safe)[:, :, None]
    least = (parts.row_min[:, None] * parts.min.astype(np.float64) / safe)[:, :, None]
    centred = parts.codes.astype(np.float64) - 8
    steps = np.rint(np.rint(16 * scale) / 16 * centred + 8 * scale - least)
    return steps.reshape(len(steps), -1) * step


def block_cols(fmt: str, cols: int) -> int:
    """Columns of x that share a scale beside a weight of this format: groups of 32, and for int8 as
    few blocks of at most 512 as it takes, all but the last alike and whole tiles of 64."""
    if fmt != "int8":
        return 32
    blocks = -(-cols // 512)
    return -(-cols // (64 * blocks)) * 64


def quantized(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x rounded to int8 with a scale per group of columns (float64), and each element's scale."""
    tokens, cols = x.shape
    groups = max(-(-cols // group), 1)
    padded = np.zeros((tokens, groups * group), np.float32)
    padded[:, :cols] = x.numpy()
    padded = padded.reshape(tokens, groups, group)
    largest = np.abs(padded).max(-1, keepdims=True)
    used = largest >= np.float32(1e-36)
    safe = np.where(used, largest, np.float32(1))
    codes = np.where(used, np.rint(padded * (np.float32(127) / safe)), np.float32(0))
    scale = np.where(used, safe / np.float32(127), np.float32(0)).astype(np.float64)
    wide = (codes.astype(np.float64) * scale).reshape(tokens, -1)[:, :cols]
    scales = np.broadcast_to(scale, padded.shape).reshape(tokens, -1)[:, :cols]
    return torch.from_numpy(wide.copy()), torch.from_numpy(scales.copy())
