"""The layouts of csrc/kernels/quant_layout.h in numpy, written from the description alone.

The encoder rounds each group to its largest element, which is simple and not the best choice of
scales; tests that judge quality compare with the float weights, tests that judge arithmetic use
`decode` (exact, float64).
"""

from __future__ import annotations

import dataclasses

import numpy as np

PANEL_ROWS = 32
GROUP = 32
FORMATS = ("int8", "int8_grouped", "int4_symmetric", "int4")
GROUPED_FORMATS = FORMATS[1:]  # a scale per group of 32 columns
HEADER_BYTES = {"int8": 128, "int8_grouped": 0, "int4_symmetric": 384, "int4": 384}
BLOCK_BYTES = {"int8": 2048, "int8_grouped": 1088, "int4_symmetric": 576, "int4": 576}
BLOCK_COLS = {"int8": 64, "int8_grouped": GROUP, "int4_symmetric": GROUP, "int4": GROUP}


@dataclasses.dataclass
class Parts:
    """A packed weight taken apart; rows and cols are padded to whole panels and groups.

    Attributes:
        codes: [rows, groups, 32], uint8, as stored (unsigned); int8: [rows, groups, 64], int8.
        scale: [rows, groups]; float16 for int8_grouped and int4_symmetric, uint8 for int4 (zeros
            for int8).
        min: [rows, groups], uint8, int4 only (zeros otherwise).
        row_scale, row_min, fold_scale: [rows], float32 (zeros where the format has none).
    """

    codes: np.ndarray
    scale: np.ndarray
    min: np.ndarray
    row_scale: np.ndarray
    row_min: np.ndarray
    fold_scale: np.ndarray


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def packed_bytes(fmt: str, rows: int, cols: int) -> int:
    """Size of a packed weight."""
    panels, groups = -(-rows // PANEL_ROWS), -(-cols // BLOCK_COLS[fmt])
    return panels * (HEADER_BYTES[fmt] + groups * BLOCK_BYTES[fmt])


def dequantize(fmt: str, parts: Parts) -> np.ndarray:
    """The float64 weights [rows, padded cols] that the parts stand for."""
    codes = parts.codes.astype(np.float64)
    scale = parts.scale.astype(np.float64)[:, :, None]
    if fmt == "int8":
        weight = parts.row_scale.astype(np.float64)[:, None, None] * codes
    elif fmt == "int8_grouped":
        weight = scale * (codes - 128)
    elif fmt == "int4_symmetric":
        weight = scale * (codes - 8)
    else:
        row_scale = parts.row_scale.astype(np.float64)[:, None, None]
        row_min = parts.row_min.astype(np.float64)[:, None, None]
        weight = row_scale * scale * codes - row_min * parts.min.astype(np.float64)[:, :, None]
    return weight.reshape(weight.shape[0], -1)


def quantize(fmt: str, weight: np.ndarray) -> Parts:
    """Round a float matrix [rows, cols] to the format, with the scales of the largest elements."""
    rows, cols = weight.shape
    padded = np.zeros((_up(rows, PANEL_ROWS), _up(cols, BLOCK_COLS[fmt])), np.float64)
    padded[:rows, :cols] = weight
    groups = padded.reshape(len(padded), -1, BLOCK_COLS[fmt])
    real = np.zeros(groups.shape[:2], bool)
    real[:rows] = True
    zeros = np.zeros(len(padded), np.float32)
    if fmt == "int8":
        row_scale = (np.abs(padded).max(-1) / 127).astype(np.float32)
        wide = np.where(row_scale > 0, row_scale, 1).astype(np.float64)[:, None, None]
        codes = np.clip(np.rint(groups / wide), -127, 127).astype(np.int8)
        unused = np.zeros(groups.shape[:2], np.uint8)
        parts = Parts(codes, unused, unused, row_scale, zeros, zeros)
    elif fmt in ("int8_grouped", "int4_symmetric"):
        offset, largest = (128, 127) if fmt == "int8_grouped" else (8, 7)
        scale = (np.abs(groups).max(-1) / largest).astype(np.float16)
        wide = np.where(scale > 0, scale, 1).astype(np.float64)[:, :, None]
        codes = np.clip(np.rint(groups / wide) + offset, 0, 2 * offset - 1).astype(np.uint8)
        parts = Parts(codes, scale, np.zeros(scale.shape, np.uint8), zeros, zeros, zeros)
    else:
        low = np.maximum(-groups.min(-1), 0)
        step = (groups.max(-1) + low) / 15
        row_scale = (step.max(-1) / 255).astype(np.float32)
        row_min = (low.max(-1) / 255).astype(np.float32)

        def per_row(value: np.ndarray, row: np.ndarray) -> np.ndarray:
            return np.clip(np.ceil(value / np.where(row > 0, row, 1)[:, None]), 0, 255)

        scale, lowest = per_row(step, row_scale), per_row(low, row_min)
        wide = row_scale[:, None] * scale
        codes = np.rint(
            (groups + (row_min[:, None] * lowest)[:, :, None])
            / np.where(wide > 0, wide, 1)[:, :, None]
        )
        codes = np.clip(codes, 0, 15).astype(np.uint8)
        scale = np.where(real, scale, 0).astype(np.uint8)
        parts = Parts(codes, scale, lowest.astype(np.uint8), row_scale, row_min, zeros)
    if fmt.startswith("int4"):
        parts.fold_scale = (np.abs(dequantize(fmt, parts)).max(-1) / 127).astype(np.float32)
    return parts


def pack(fmt: str, parts: Parts) -> np.ndarray:
    """The bytes of a packed weight, uint8 [packed_bytes]."""
    rows, groups, _ = parts.codes.shape
    panels = rows // PANEL_ROWS
    if fmt == "int8":
        # [panel, half, row, group, dword, byte] -> [panel, group, half, dword, row, byte]
        codes = parts.codes.reshape(panels, 2, 16, groups, 16, 4).transpose(0, 3, 1, 4, 2, 5)
        body = np.ascontiguousarray(codes).reshape(panels, -1).view(np.uint8)
        header = parts.row_scale.reshape(panels, PANEL_ROWS).view(np.uint8)
        return np.concatenate([header, body], 1).reshape(-1)
    blocks = np.zeros((panels, groups, BLOCK_BYTES[fmt]), np.uint8)
    scale = parts.scale.reshape(panels, PANEL_ROWS, groups).transpose(0, 2, 1)
    if fmt == "int4":
        blocks[:, :, :32] = scale
        blocks[:, :, 32:64] = parts.min.reshape(panels, PANEL_ROWS, groups).transpose(0, 2, 1)
    else:
        blocks[:, :, :64] = np.ascontiguousarray(scale.astype(np.float16)).view(np.uint8)
    if fmt == "int8_grouped":
        # [panel, half, row, group, dword, byte] -> [panel, group, half, dword, row, byte]
        codes = parts.codes.reshape(panels, 2, 16, groups, 8, 4).transpose(0, 3, 1, 4, 2, 5)
    else:
        # [panel, half, row, group, dword, nibble, byte] -> [panel, group, half, dword, row, byte]
        split = parts.codes.reshape(panels, 2, 16, groups, 4, 2, 4)
        codes = (split[..., 0, :] | split[..., 1, :] << 4).transpose(0, 3, 1, 4, 2, 5)
    blocks[:, :, 64:] = codes.reshape(panels, groups, -1)
    body = blocks.reshape(panels, -1)
    if fmt == "int8_grouped":
        return body.reshape(-1).copy()
    header = np.stack([parts.row_scale, parts.row_min, parts.fold_scale], 1).astype(np.float32)
    header = np.ascontiguousarray(header.reshape(panels, PANEL_ROWS, 3).transpose(0, 2, 1))
    return np.concatenate([header.reshape(panels, -1).view(np.uint8), body], 1).reshape(-1)


def unpack(fmt: str, data: np.ndarray, rows: int, cols: int) -> Parts:
    """Inverse of `pack`; data is uint8 [packed_bytes(fmt, rows, cols)]."""
    assert data.dtype == np.uint8 and data.shape == (packed_bytes(fmt, rows, cols),)
    groups = -(-cols // BLOCK_COLS[fmt])
    panels = -(-rows // PANEL_ROWS)
    table = data.reshape(panels, -1)
    header = np.ascontiguousarray(table[:, : HEADER_BYTES[fmt]])
    blocks = np.ascontiguousarray(table[:, HEADER_BYTES[fmt] :]).reshape(panels, groups, -1)

    def by_row(values: np.ndarray) -> np.ndarray:
        return values.transpose(0, 2, 1).reshape(panels * PANEL_ROWS, groups)

    zeros = np.zeros((panels * PANEL_ROWS, groups), np.uint8)
    if fmt == "int8":
        codes = blocks.view(np.int8).reshape(panels, groups, 2, 16, 16, 4)
        codes = codes.transpose(0, 2, 4, 1, 3, 5).reshape(panels * PANEL_ROWS, groups, -1)
        row_scale = header.view(np.float32).reshape(-1)
        none = np.zeros_like(row_scale)
        return Parts(codes, zeros, zeros, row_scale, none, none)
    if fmt == "int4":
        scale, lowest = by_row(blocks[:, :, :32]), by_row(blocks[:, :, 32:64])
    else:
        scale, lowest = by_row(np.ascontiguousarray(blocks[:, :, :64]).view(np.float16)), zeros
    body = blocks[:, :, 64:]
    if fmt == "int8_grouped":
        codes = body.reshape(panels, groups, 2, 8, 16, 4).transpose(0, 2, 4, 1, 3, 5)
    else:
        packed = body.reshape(panels, groups, 2, 4, 16, 4).transpose(0, 2, 4, 1, 3, 5)
        codes = np.stack([packed & 15, packed >> 4], -2)
    codes = codes.reshape(panels * PANEL_ROWS, groups, GROUP)
    per_row = np.zeros((3, panels * PANEL_ROWS), np.float32)
    if fmt != "int8_grouped":
        per_row = (
            header.view(np.float32).reshape(panels, 3, PANEL_ROWS).transpose(1, 0, 2).reshape(3, -1)
        )
    return Parts(codes, scale, lowest, *per_row)


def encode(fmt: str, weight: np.ndarray) -> np.ndarray:
    """Quantise and pack a float matrix [rows, cols]: uint8 [packed_bytes]."""
    return pack(fmt, quantize(fmt, weight))


def decode(fmt: str, data: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """The float64 matrix [rows, cols] that packed bytes stand for."""
    return dequantize(fmt, unpack(fmt, data, rows, cols))[:rows, :cols]
