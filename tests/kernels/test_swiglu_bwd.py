"""csrc/kernels/cpu/swiglu_bwd.cpp against float64."""

from __future__ import annotations

import pytest
import torch
from gradients import assert_gradients

from qwen_native import ops, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 17), (2, 1023), (5, 1025), (2, 4864)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_matches_autograd(isa, rng, shape, dtype, scale):
    gate = (torch.randn(shape, generator=rng) * scale).to(dtype)
    up, dout = torch.randn((2, *shape), generator=rng).to(dtype)
    grads = ops.swiglu_bwd(dout, gate, up)
    assert_gradients(grads, reference.swiglu, (gate, up), dout)


def test_columns_of_a_fused_projection(isa, rng):
    gate, up = torch.randn((4, 140), generator=rng).split(70, 1)
    dout = torch.randn((4, 70), generator=rng)
    strided = ops.swiglu_bwd(dout, gate, up)
    dense = ops.swiglu_bwd(dout, gate.contiguous(), up.contiguous())
    assert torch.equal(strided[0], dense[0])
    assert torch.equal(strided[1], dense[1])


def test_large_gates_give_finite_gradients(isa):
    gate = torch.tensor([[-1e30, -200.0, 200.0, 1e30]])
    dgate, dup = ops.swiglu_bwd(torch.ones(1, 4), gate, torch.ones(1, 4))
    assert dgate.tolist() == [[0, 0, 1, 1]]
    assert torch.equal(dup, torch.tensor([[0, 0, 200.0, 1e30]]))


def test_wrong_shapes_are_named():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"\[swiglu_bwd\] up is f32\[2, 5\], expected f32\[2, 4\]"):
        ops.swiglu_bwd(x, x, torch.ones(2, 5))
