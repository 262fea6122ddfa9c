"""csrc/kernels/cpu/swiglu.cpp against float64."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_pointwise

from qwen_native import _C, ops

SHAPES = [
    (0, 64),
    (1, 1),
    (1, 4864),
    (3, 17),
    (5, 1023),
    (5, 1024),
    (5, 1025),
    (2, 2049),
    (33, 100),
]


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate = gate.double()
    return gate * torch.sigmoid(gate) * up.double()


def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 20.0, 1e3])
def test_matches_reference(isa, rng, shape, dtype, scale):
    gate = (torch.randn(shape, generator=rng) * scale).to(dtype)
    up = torch.randn(shape, generator=rng).to(dtype)
    assert_pointwise(ops.swiglu(gate, up), reference(gate, up), plain(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["gate", "up", "strided"])
def test_out_may_be_an_input_or_a_slice(isa, rng, dtype, target):
    storage = torch.randn((3, 2500), generator=rng).to(dtype)
    gate, up = storage[:, 10:1210], storage[:, 1210:2410]
    expected = ops.swiglu(gate.contiguous(), up.contiguous())
    assert_pointwise(expected, reference(gate, up), plain(gate, up))
    before = storage.clone()
    room = torch.zeros((3, 1300), dtype=dtype)
    out = {"gate": gate, "up": up, "strided": room[:, 50:1250]}[target]
    assert torch.equal(ops.swiglu(gate, up, out=out), expected)
    assert torch.equal(storage[:, :10], before[:, :10])
    assert torch.equal(storage[:, 2410:], before[:, 2410:])
    assert not room[:, :50].any() and not room[:, 1250:].any()


def test_independent_of_threads_and_rows(isa, rng):
    gate, up = torch.randn((2, 9, 3000), generator=rng)
    threads = _C.op_threads()
    together = ops.swiglu(gate, up)
    _C.set_op_threads(1 if threads > 1 else 2)
    assert torch.equal(together, ops.swiglu(gate, up))
    _C.set_op_threads(threads)
    assert torch.equal(together[4:5], ops.swiglu(gate[4:5], up[4:5]))


def test_special_values(isa):
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([[0.0, -0.0, inf, -inf, nan, 1.0, -200.0, 200.0]])
    out = ops.swiglu(gate, torch.ones_like(gate))[0]
    assert out[:3].tolist() == [0.0, 0.0, inf]
    assert torch.isnan(out[3:5]).all()
    assert abs(out[5].item() - 0.7310585786) < 1e-7
    assert out[6:].tolist() == [0.0, 200.0]


def test_wrong_shape_is_named():
    with pytest.raises(
        ValueError, match=r"\[swiglu\] up is f32\[2, 5\], expected f32\[2, 4\] as gate"
    ):
        ops.swiglu(torch.ones(2, 4), torch.ones(2, 5))
