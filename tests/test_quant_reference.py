"""tests/quant_reference.py: byte positions worked out by hand from quant_layout.h, and round
trips."""

from __future__ import annotations

import numpy as np
import pytest
from quant_reference import FORMATS, decode, encode, pack, packed_bytes, quantize, unpack


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (32, 32), (70, 100)])
def test_round_trip(fmt, shape):
    weight = np.random.default_rng(3).standard_normal(shape)
    parts = quantize(fmt, weight)
    data = pack(fmt, parts)
    assert data.shape == (packed_bytes(fmt, *shape),)
    back = unpack(fmt, data, *shape)
    for name in ("codes", "scale", "min", "row_scale", "row_min", "fold_scale"):
        assert np.array_equal(getattr(back, name), getattr(parts, name)), name
    step = {"int8": 1 / 127, "int8_grouped": 1 / 127, "int4_symmetric": 1 / 7, "int4": 2 / 15}[
        fmt
    ] * np.abs(weight).max()
    assert np.abs(decode(fmt, encode(fmt, weight), *shape) - weight).max() <= 0.75 * step


def test_int8_byte_position():
    data = np.zeros(packed_bytes("int8", 64, 130), np.uint8)
    row, col = 32 + 16 + 5, 64 + 4 * 11 + 2  # second panel, second half, second block
    panel = 128 + 3 * 2048
    data[panel + 4 * 21 : panel + 4 * 22] = np.array([0.5], np.float32).view(np.uint8)
    data[panel + 128 + 2048 + ((1 * 16 + 11) * 16 + 5) * 4 + 2] = 256 - 3
    weight = decode("int8", data, 64, 130)
    assert weight[row, col] == -1.5
    weight[row, col] = 0
    assert not weight.any()


def test_int8_grouped_byte_position():
    data = np.zeros(packed_bytes("int8_grouped", 64, 64), np.uint8)
    row, col = 32 + 16 + 5, 32 + 4 * 3 + 2  # second panel, second half, second group
    block = 2 * 1088 + 1088
    data[block + 2 * (row - 32) : block + 2 * (row - 32) + 2] = np.array([0.5], np.float16).view(
        np.uint8
    )
    data[block + 64 + ((1 * 8 + 3) * 16 + 5) * 4 + 2] = 131
    weight = decode("int8_grouped", data, 64, 64)
    assert weight[row, col] == 1.5
    weight[row, 32:] = 0
    assert not weight.any()


@pytest.mark.parametrize("high", [False, True])
def test_int4_byte_position(high):
    data = np.zeros(packed_bytes("int4", 64, 64), np.uint8)
    row, col = (
        32 + 5,
        32 + 8 * 2 + (4 if high else 0) + 3,
    )  # second panel, second group, dword 2, byte 3
    header = 384 + 2 * 576
    data[header + 4 * 5 : header + 4 * 5 + 4] = np.array([0.25], np.float32).view(np.uint8)
    data[header + 128 + 4 * 5 : header + 128 + 4 * 5 + 4] = np.array([0.5], np.float32).view(
        np.uint8
    )
    block = header + 384 + 576
    data[block + 5], data[block + 32 + 5] = 3, 7
    data[block + 64 + (2 * 16 + 5) * 4 + 3] = 0xD0 if high else 0x0D
    weight = decode("int4", data, 64, 64)
    assert weight[row, col] == 0.25 * 3 * 13 - 0.5 * 7
    others = np.delete(weight[row, 32:], col - 32)
    assert (others == -3.5).all()
    weight[row, 32:] = 0
    assert not weight.any()
