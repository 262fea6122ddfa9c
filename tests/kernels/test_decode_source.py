"""csrc/kernels/cpu/decode_source.cpp against the gguf package, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_blocks import SOURCES, block, decoded, random_tensor

from qwen_native import ops

SHAPES = [(1, 1), (3, 2), (7, 3), (33, 1)]  # rows, blocks


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-6, 0.02, 500.0])
def test_matches_gguf(isa, source, shape, scale):
    rng = np.random.default_rng(1)
    rows, cols = shape[0], shape[1] * block(source)[0]
    data = random_tensor(source, rows, cols, rng, scale)
    out = ops.decode_source(data, source, (rows, cols))
    assert np.array_equal(bits(out), bits(decoded(data, source, rows, cols)))


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("cols", [15, 16, 17, 100])
def test_plain_floats_of_odd_width(isa, source, cols):
    data = random_tensor(source, 5, cols, np.random.default_rng(2))
    out = ops.decode_source(data, source, (5, cols))
    assert np.array_equal(bits(out), bits(decoded(data, source, 5, cols)))


def test_every_half(isa):
    """All 65536 patterns of binary16, subnormals, infinities and NaN included."""
    halves = np.arange(65536, dtype=np.uint16)
    out = ops.decode_source(halves.view(np.uint8), "F16", (16, 4096)).reshape(-1)
    np.testing.assert_array_equal(out, halves.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("source", SOURCES)
def test_any_address(isa, source):
    rows, cols = 3, 2 * block(source)[0]
    data = random_tensor(source, rows, cols, np.random.default_rng(3))
    shifted = np.empty(data.size + 1, np.uint8)[1:]
    shifted[:] = data
    out = ops.decode_source(shifted, source, (rows, cols))
    assert np.array_equal(bits(out), bits(decoded(data, source, rows, cols)))


@pytest.mark.parametrize("source", SOURCES)
def test_pack_to_f32_and_bf16(isa, source):
    rows, cols = 5, 2 * block(source)[0]
    data = random_tensor(source, rows, cols, np.random.default_rng(4))
    values = decoded(data, source, rows, cols)
    full = ops.pack_weight(data, source, (rows, cols), "f32")
    assert np.array_equal(full.data, values.reshape(-1).view(np.uint8))
    narrow = ops.pack_weight(data, source, (rows, cols), "bf16")
    wide = bits(values).astype(np.uint64)
    rounded = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
    assert np.array_equal(narrow.data.view(np.uint16), rounded.astype(np.uint16).ravel())
    unpacked = (rounded << 16).astype(np.uint32).reshape(rows, cols)
    assert np.array_equal(bits(ops.unpack_weight(narrow)), unpacked)
    assert np.array_equal(bits(ops.unpack_weight(full)), bits(values))


def test_no_rows(isa):
    empty = np.empty(0, np.uint8)
    assert ops.decode_source(empty, "Q4_K", (0, 256)).shape == (0, 256)


@pytest.mark.parametrize(
    ("size", "source", "shape", "message"),
    [
        (18, "Q9_9", (1, 32), "type is 'Q9_9', expected one of F32"),
        (17, "Q4_0", (1, 32), r"data has 17 bytes, expected 18 for Q4_0\[1, 32\]"),
        (18, "Q4_0", (1, 31), "31 columns, expected a multiple of the block of 32"),
        (18, "Q4_0", (-1, 32), "expected rows >= 0"),
        (18, "Q4_0", (1, 0), "cols >= 1"),
        (18, "Q4_0", (1 << 62, 32), "fewer than 2.48 elements"),
        (18, "F32", (1, (1 << 63) - 1), "fewer than 2.48 elements"),
    ],
)
def test_mistakes_are_named(size, source, shape, message):
    with pytest.raises(ValueError, match=message):
        ops.decode_source(np.zeros(size, np.uint8), source, shape)
