"""csrc/kernels/cpu/squared_norm.cpp against float64."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_contraction

from qwen_native import _C, ops


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (63,), (65,), (4096,), (3, 1367), (2, 5, 4111)])
def test_matches_float64(isa, rng, shape, dtype, scale):
    # Several at once: a single sum of torch's may be right to the last bit by luck.
    tensors = [(scale * torch.randn(shape, generator=rng)).to(dtype) for _ in range(16)]
    out = torch.tensor([ops.squared_norm(x) for x in tensors])
    base = torch.stack([x.float().square().sum() for x in tensors])
    assert_contraction(out, torch.stack([x.double().square().sum() for x in tensors]), base)


def test_sums_of_many_blocks_keep_their_digits(isa):
    # In float32, a running sum would stop growing at 2^24.
    assert ops.squared_norm(torch.ones(20_000_001, dtype=torch.bfloat16)) == 20_000_001


def test_edges(isa):
    assert ops.squared_norm(torch.empty(0)) == 0
    for position in (0, 4095, 4096, 9000):
        x = torch.ones(9001)
        x[position] = math.nan
        assert math.isnan(ops.squared_norm(x))
        x[position] = -math.inf
        assert ops.squared_norm(x) == math.inf


def test_threads_change_nothing(isa, rng):
    x, threads = torch.randn(300_001, generator=rng), _C.op_threads()
    first = ops.squared_norm(x)
    _C.set_op_threads(1 if threads > 1 else 2)
    second = ops.squared_norm(x)
    _C.set_op_threads(threads)
    assert first == second


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"\[squared_norm\] x is i32, expected f32 or bf16"):
        ops.squared_norm(torch.ones(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\[squared_norm\] x is f32\[4, 2\] with gaps"):
        ops.squared_norm(torch.ones(4, 4)[:, :2])
