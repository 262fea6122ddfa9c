"""csrc/kernels/cpu/matmul.cpp against float64."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_contraction
from torch import Tensor

from qwen_native import _C, ops

SHAPES = [
    (1, 1, 1),
    (17, 33, 31),
    (32, 64, 32),
    (33, 300, 65),
    (70, 97, 1100),  # several passes
    (1060, 65, 40),
    (8200, 33, 40),  # several blocks of rows
    (1060, 40, 1100),  # the same in several passes
    (40, 70, 8230),  # several blocks of depth
    (3, 5, 0),
    (0, 5, 7),
]


@pytest.fixture
def amx():
    if "amx" not in ops.available_isas():
        pytest.skip("this host has no AMX")
    before = _C.active_isa()
    ops.set_isa("amx")
    yield
    ops.set_isa(before)


def operands(
    rng: torch.Generator, m: int, n: int, k: int, a_transposed: bool, b_transposed: bool
) -> tuple[Tensor, Tensor]:
    """With rows that are not dense in memory."""
    a = torch.randn((k, m + 3) if a_transposed else (m, k + 3), generator=rng).bfloat16()
    b = torch.randn((n, k + 5) if b_transposed else (k, n + 5), generator=rng).bfloat16()
    return a[:, : a.shape[1] - 3], b[:, : b.shape[1] - 5]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_matches_reference(amx, rng, shape, a_transposed, b_transposed):
    m, n, k = shape
    a, b = operands(rng, *shape, a_transposed, b_transposed)
    switches = {"a_transposed": a_transposed, "b_transposed": b_transposed}
    left, right = a.T if a_transposed else a, b.T if b_transposed else b
    ref, base = left.double() @ right.double(), left @ right
    assert_contraction(ops.matmul(a, b, **switches), ref, base)
    if k <= 1100:  # torch adds longer float32 sums up in blocks, tiles in sequence
        wide = ops.matmul(a, b, out=torch.empty(m, n), **switches)
        assert_contraction(wide, ref, left.float() @ right.float())
    bias, before = torch.randn(n, generator=rng), torch.randn((m, n), generator=rng)
    bias, out = bias.bfloat16(), before.bfloat16()
    added = ops.matmul(a, b, bias, out=out.clone(), add=True, **switches)
    assert_contraction(added, out.double() + ref + bias.double(), out + base + bias)


def test_rows_threads_and_columns_change_nothing(amx, rng):
    a, b = torch.randn((100, 600), generator=rng).bfloat16(), torch.randn((600, 70), generator=rng)
    b = b.bfloat16()
    out = ops.matmul(a, b)
    assert torch.equal(out[37:55], ops.matmul(a[37:55], b))
    assert torch.equal(out[:, 40:], ops.matmul(a, b[:, 40:]))
    threads = _C.op_threads()
    _C.set_op_threads(1 if threads > 1 else 2)
    assert torch.equal(out, ops.matmul(a, b))
    _C.set_op_threads(threads)


def test_only_its_own_columns_are_written(amx, rng):
    storage = torch.full((40, 90), 7.0).bfloat16()
    a, b = torch.ones(40, 33).bfloat16(), torch.ones(33, 50).bfloat16()
    ops.matmul(a, b, out=storage[:, 20:70])
    assert (storage[:, 20:70] == 33).all()
    assert (storage[:, :20] == 7).all()
    assert (storage[:, 70:] == 7).all()


def test_wrong_inputs_are_named(amx):
    a, b = torch.ones(4, 8).bfloat16(), torch.ones(8, 6).bfloat16()
    with pytest.raises(ValueError, match=r"\[matmul\] a is f32\[4, 8\], expected a bf16 matrix"):
        ops.matmul(a.float(), b)
    with pytest.raises(
        ValueError, match=r"b is bf16\[8, 6\], expected 8 elements along its second"
    ):
        ops.matmul(a, b, b_transposed=True)
    with pytest.raises(ValueError, match=r"bias is bf16\[5\], expected dense bf16\[6\]"):
        ops.matmul(a, b, torch.ones(5).bfloat16())
    with pytest.raises(ValueError, match=r"out is bf16\[4, 5\], expected \[4, 6\]"):
        ops.matmul(a, b, out=torch.empty(4, 5).bfloat16())
    with pytest.raises(ValueError, match=r"out is missing"):
        ops.matmul(a, b, add=True)


def test_levels_without_it_say_so(isa):
    assert ops.has_matmul() == (isa == "amx")
    if isa != "amx":
        with pytest.raises(
            ValueError, match=rf"\[matmul\] the active level is {isa}, expected amx"
        ):
            ops.matmul(torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16())
