"""csrc/kernels/cpu/adamw.cpp against float64."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_contraction
from torch import Tensor

from qwen_native import _C, ops

OPTIONS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
RATE = 1e-2


def torch_steps(weight: Tensor, grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Parameter and moments after torch's own AdamW."""
    parameter = weight.clone().requires_grad_()
    betas = (OPTIONS["beta1"], OPTIONS["beta2"])
    optimiser = torch.optim.AdamW(
        [parameter], RATE, betas, OPTIONS["eps"], OPTIONS["weight_decay"], foreach=False
    )
    for grad in grads:
        parameter.grad = grad.to(weight.dtype)
        optimiser.step()
    state = optimiser.state[parameter]
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (40,), (5, 70), (16385,), (33000,)])
def test_matches_torch(isa, rng, shape, dtype):
    weight = torch.randn(shape, generator=rng)
    grads = [torch.randn(shape, generator=rng).to(dtype) * 10.0**-i for i in range(3)]
    state = [weight.clone(), torch.zeros(shape), torch.zeros(shape)]
    narrow = weight.bfloat16()
    for step, grad in enumerate(grads, 1):
        ops.adamw(*state, 4 * grad, narrow, step=step, rate=RATE, grad_scale=0.25, **OPTIONS)
    ref = torch_steps(weight.double(), [g.double() for g in grads])
    for out, expected, base in zip(state, ref, torch_steps(weight, grads), strict=True):
        assert_contraction(out, expected, base)
    assert torch.equal(narrow, state[0].bfloat16())


def test_threads_change_nothing(isa, rng):
    def run() -> list[Tensor]:
        tensors = list(torch.randn((4, 50000), generator=rng.manual_seed(1)))
        tensors[2].abs_()
        ops.adamw(*tensors, step=3, rate=RATE)
        return tensors[:3]

    first, threads = run(), _C.op_threads()
    _C.set_op_threads(1 if threads > 1 else 2)
    second = run()
    _C.set_op_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_wrong_inputs_are_named():
    x = torch.ones(4)
    with pytest.raises(ValueError, match=r"\[adamw\] mean is f32\[5\], expected dense elements in"):
        ops.adamw(x, torch.ones(5), x, x, step=1, rate=0.1)
    with pytest.raises(ValueError, match=r"\[adamw\] master is bf16, expected f32"):
        ops.adamw(x.bfloat16(), x, x, x, step=1, rate=0.1)
    with pytest.raises(ValueError, match=r"\[adamw\] parameter is f32, expected bf16"):
        ops.adamw(x, x, x, x, x, step=1, rate=0.1)
    with pytest.raises(ValueError, match=r"\[adamw\] step is 0, expected at least 1"):
        ops.adamw(x, x, x, x, step=0, rate=0.1)
    with pytest.raises(ValueError, match=r"\[adamw\] beta2 is 1, expected 0 to below 1"):
        ops.adamw(x, x, x, x, step=1, rate=0.1, beta2=1.0)
