"""csrc/kernels/cpu/gather.cpp against the independent decoder of quant_reference.py."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import quant_reference as quant
import torch
from tolerance import assert_contraction, assert_pointwise

from qwen_native import _C, ops
from qwen_native.ops import PackedWeight

SHAPES = [(1, 1), (5, 31), (33, 32), (64, 33), (70, 896), (100, 100)]


@functools.cache
def packed(fmt: str, rows: int, cols: int, scale: float = 1.0) -> PackedWeight:
    weight = np.random.default_rng(11).standard_normal((rows, cols)) * scale
    return PackedWeight(quant.encode(fmt, weight), fmt, rows, cols)


def plain(fmt: str, parts: quant.Parts) -> np.ndarray:
    """The layout's formula in float32, every step rounded."""
    one = np.float32(1)
    codes, scale = parts.codes * one, parts.scale[:, :, None] * one
    if fmt == "int8":
        weight = parts.row_scale[:, None, None] * codes
    elif fmt == "int8_grouped":
        weight = scale * (codes - 128 * one)
    elif fmt == "int4_symmetric":
        weight = scale * (codes - 8 * one)
    else:
        low = parts.row_min[:, None, None] * (parts.min[:, :, None] * one)
        weight = parts.row_scale[:, None, None] * scale * codes - low
    assert weight.dtype == np.float32
    return weight.reshape(len(weight), -1)


def assert_rows(out: torch.Tensor, table: PackedWeight, ids: list[int]) -> None:
    parts = quant.unpack(table.format, table.data, table.rows, table.cols)
    ref = quant.decode(table.format, table.data, table.rows, table.cols)[ids]
    base = plain(table.format, parts)[ids, : table.cols]
    # scale * code - min cancels, so for int4 errors are judged against the size of the row.
    check = assert_contraction if table.format == "int4" else assert_pointwise
    check(out, torch.from_numpy(ref), torch.from_numpy(base))


@pytest.mark.parametrize("fmt", quant.FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_packed_rows(isa, fmt, shape, scale):
    table = packed(fmt, *shape, scale)
    ids = [*range(shape[0]), 0, shape[0] - 1]
    assert_rows(ops.gather(torch.tensor(ids, dtype=torch.int32), table), table, ids)


@pytest.mark.parametrize("fmt", quant.FORMATS)
def test_every_code_and_random_bytes(isa, fmt):
    """Any bytes are a valid weight as long as the scales are finite."""
    rng = np.random.default_rng(5)
    parts = quant.quantize(fmt, rng.standard_normal((64, 512)))
    if fmt == "int8":
        parts.codes = rng.integers(-128, 128, parts.codes.shape, np.int8)
    else:
        codes = 256 if fmt == "int8_grouped" else 16
        parts.codes = rng.integers(0, codes, parts.codes.shape, np.uint8)
    if fmt == "int4":
        parts.scale = rng.integers(0, 256, parts.scale.shape, np.uint8)
        parts.min = rng.integers(0, 256, parts.min.shape, np.uint8)
    table = PackedWeight(quant.pack(fmt, parts), fmt, 64, 512)
    ids = list(range(64))
    assert_rows(ops.gather(torch.tensor(ids, dtype=torch.int32), table), table, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strided", [False, True])
def test_float_rows_are_copied_exactly(isa, rng, dtype, shape, strided):
    storage = torch.randn((shape[0], shape[1] + 9), generator=rng).to(dtype)
    table = storage[:, 4 : 4 + shape[1]] if strided else storage[:, : shape[1]].contiguous()
    ids = torch.tensor([shape[0] - 1, 0, shape[0] // 2], dtype=torch.int32)
    assert torch.equal(ops.gather(ids, table), table[ids.long()].float())


def test_numpy_strided_ids_and_no_ids(isa):
    table = packed("int8_grouped", 40, 64)
    ids = np.arange(40, dtype=np.int32)[::3]
    out = ops.gather(ids, table)
    assert isinstance(out, np.ndarray)
    assert_rows(torch.from_numpy(out), table, ids.tolist())
    assert ops.gather(ids[:0], table).shape == (0, 64)


def test_special_values_are_copied(isa):
    table = torch.tensor([[1.0, float("nan"), float("inf"), -float("inf")]])
    out = ops.gather(torch.zeros(1, dtype=torch.int32), table)
    assert torch.equal(torch.isnan(out), torch.isnan(table))
    assert out[0, 2:].tolist() == [float("inf"), -float("inf")]


def test_independent_of_threads(isa):
    table = packed("int4", 200, 96)
    ids = torch.arange(200, dtype=torch.int32)
    threads = _C.op_threads()
    out = ops.gather(ids, table)
    _C.set_op_threads(1 if threads > 1 else 2)
    assert torch.equal(out, ops.gather(ids, table))
    _C.set_op_threads(threads)


@pytest.mark.parametrize("bad", [-1, 40, 2**31 - 1])
def test_ids_outside_the_table_are_named(bad):
    ids = torch.tensor([0, bad], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"\[gather\] ids\[1\] is {bad}, expected 0 to 39"):
        ops.gather(ids, packed("int8_grouped", 40, 64))


def test_wrong_table_is_named():
    ids = torch.zeros(1, dtype=torch.int32)
    for fmt, size in [("int8", 2176), ("int8_grouped", 1088)]:
        with pytest.raises(ValueError, match=rf"\[weight\] data has 10 bytes, expected {size}"):
            ops.gather(ids, PackedWeight(np.zeros(10, np.uint8), fmt, 3, 4))
    with pytest.raises(ValueError, match=r"\[weight\] format is 'int5'"):
        ops.gather(ids, PackedWeight(np.zeros(10, np.uint8), "int5", 3, 4))
