"""csrc/kernels/cuda/adamw.cu against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_simulator import CUDA, Buffer, Simulator, dtype_value, struct
from tolerance import assert_contraction

DTYPES = [torch.float32, torch.bfloat16]
BETA1, BETA2, EPS, DECAY, RATE = 0.9, 0.95, 1e-8, 0.1, 1e-2


def step(
    sim: Simulator,
    state: list[Buffer],
    grad: torch.Tensor,
    parameter: Buffer | None,
    step: int,
    grad_scale: float = 1.0,
    offset: int = 0,
) -> None:
    """One step of master, mean and square, all but the first `offset` elements."""
    c1, c2 = 1 - BETA1**step, 1 - BETA2**step
    args = struct("AdamwArgs")(
        **{
            name: buffer.pointer + 4 * offset
            for name, buffer in zip(("master", "mean", "square"), state, strict=True)
        },
        parameter=None if parameter is None else parameter.pointer + 2 * offset,
        grad=sim.upload(grad).pointer + offset * grad.itemsize,
        n=len(grad) - offset,
        grad_scale=grad_scale,
        beta1=BETA1,
        rest1=1 - BETA1,
        beta2=BETA2,
        rest2=1 - BETA2,
        eps=EPS,
        keep=1 - RATE * DECAY,
        rate=RATE / c1,
        correction2=1 / c2,
        grad_dtype=dtype_value(grad.dtype),
    )
    assert sim.call("qn_cuda_adamw", args) == 0


def torch_steps(weight: torch.Tensor, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Parameter and moments after torch's own AdamW."""
    parameter = weight.clone().requires_grad_()
    optimiser = torch.optim.AdamW([parameter], RATE, (BETA1, BETA2), EPS, DECAY, foreach=False)
    for grad in grads:
        parameter.grad = grad.to(weight.dtype)
        optimiser.step()
    state = optimiser.state[parameter]
    return [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 8, 45, 2048, 4100])
@pytest.mark.parametrize("narrow", [False, True])
def test_matches_torch(sim, rng, dtype, n, narrow):
    weight = torch.randn(n, generator=rng)
    grads = [(torch.randn(n, generator=rng) * 10.0**-i).to(dtype) for i in range(3)]
    state = [sim.upload(x) for x in (weight, torch.zeros(n), torch.zeros(n))]
    parameter = sim.empty((n,), torch.bfloat16) if narrow else None
    for i, grad in enumerate(grads, 1):
        step(sim, state, 4 * grad, parameter, i, grad_scale=0.25)
    ref = torch_steps(weight.double(), [g.double() for g in grads])
    for out, expected, base in zip(state, ref, torch_steps(weight, grads), strict=True):
        assert_contraction(out.tensor(), expected, base)
    if parameter is not None:
        assert torch.equal(parameter.tensor(), state[0].tensor().bfloat16())


def test_nothing_to_do(sim):
    step(sim, [sim.empty((0,), torch.float32)] * 3, torch.empty(0), None, 1)
    assert sim.counters().launches == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_may_begin_anywhere(sim, rng, dtype):
    weight, grad = torch.randn(100, generator=rng), torch.randn(100, generator=rng).to(dtype)
    results = []
    for offset in (0, 3):
        state = [sim.upload(x) for x in (weight, torch.zeros(100), torch.zeros(100))]
        step(sim, state, grad, None, 1, offset=offset)
        results.append(state[0].tensor())
    assert torch.equal(results[1][:3], weight[:3])
    assert torch.equal(results[0][3:], results[1][3:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_is_the_minimum(sim, rng, dtype):
    n = 8192
    state = [sim.upload(x) for x in torch.rand((3, n), generator=rng)]
    step(sim, state, torch.rand(n, generator=rng).to(dtype), sim.empty((n,), torch.bfloat16), 2)
    counted = sim.counters()
    assert 32 * counted.load_sectors == counted.load_bytes == n * (12 + dtype.itemsize)
    assert 32 * counted.store_sectors == counted.store_bytes == n * 14


@pytest.mark.parametrize("dtype", DTYPES)
def test_ptx_agrees(sim, rng, dtype):
    sim.compare_with_ptx(CUDA / "adamw.cu")
    state = [sim.upload(x) for x in torch.rand((3, 41), generator=rng)]
    step(sim, state, torch.rand(41, generator=rng).to(dtype), sim.empty((41,), torch.bfloat16), 2)
