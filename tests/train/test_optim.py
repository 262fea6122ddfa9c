"""AdamW and the schedules against torch's optimiser and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from qwen_native.train.config import OptimOptions
from qwen_native.train.optim import AdamW, learning_rate


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (5, 7), "norm": (7,)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def set_gradients(named: dict[str, torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.dtype)


def test_matches_torch_with_decay_on_matrices_only():
    options = OptimOptions(learning_rate=0.1, weight_decay=0.3, clip_norm=0.0)
    ours = parameters()
    theirs = {name: torch.nn.Parameter(p.detach().double()) for name, p in ours.items()}
    reference = torch.optim.AdamW(
        [
            {"params": [theirs["matrix"]], "weight_decay": 0.3},
            {"params": [theirs["norm"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    optimiser = AdamW(ours, options)
    for step in range(20):
        rate = 0.1 / (step + 1)
        set_gradients(ours, step)
        for name, parameter in theirs.items():
            parameter.grad = ours[name].grad.double()
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        optimiser.step(rate)
    for name in ours:
        # 20 steps, each within a few roundings of float32.
        torch.testing.assert_close(ours[name].double(), theirs[name], rtol=2e-5, atol=2e-6)


def test_clipping_scales_the_whole_gradient():
    named = parameters()
    set_gradients(named, 1)
    whole = torch.cat([p.grad.flatten() for p in named.values()]).norm()
    start = {name: p.detach().clone() for name, p in named.items()}
    # With eps far above the gradient, the update is proportional to it.
    options = OptimOptions(learning_rate=1.0, weight_decay=0.0, eps=1.0, clip_norm=1e-4)
    gradients = {name: p.grad.clone() for name, p in named.items()}
    norm = AdamW(named, options).step(1.0)
    assert norm == pytest.approx(float(whole), rel=1e-6)
    for name, parameter in named.items():
        expected = -gradients[name] * 1e-4 / whole
        torch.testing.assert_close(parameter.detach() - start[name], expected, rtol=1e-2, atol=2e-7)


def test_small_steps_are_not_lost_in_bf16():
    """An update of 1e-4 of a value is below bf16's resolution; a hundred of them are not."""
    named = {"p": torch.nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))}
    options = OptimOptions(learning_rate=1e-4, weight_decay=0.0)
    optimiser = AdamW(named, options)
    for _ in range(100):
        named["p"].grad = torch.ones_like(named["p"])
        optimiser.step(1e-4)
    assert optimiser.master["p"][0, 0].item() == pytest.approx(0.99, abs=1e-5)
    assert torch.equal(named["p"], optimiser.master["p"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_passes_add_up_in_float32(dtype):
    parameter = torch.nn.Parameter(torch.ones(1, 1, dtype=dtype))
    optimiser = AdamW({"p": parameter}, OptimOptions(learning_rate=1.0))
    optimiser.accumulate()
    for value in [256.0, *[1.0] * 8]:  # 256 + 1 is 256 in bf16
        (parameter * value).sum().backward()
    assert optimiser.gradient_norm() == 264.0
    optimiser.step(0.0)
    assert parameter.grad is None
    assert optimiser.gradient_norm() == 0.0
    (parameter * 2.0).sum().backward()  # the hooks are gone
    assert parameter.grad is not None


def test_a_gradient_that_is_not_finite_changes_nothing():
    named = parameters()
    start = {name: p.detach().clone() for name, p in named.items()}
    optimiser = AdamW(named, OptimOptions(learning_rate=1.0))
    set_gradients(named, 0)
    named["norm"].grad[3] = float("inf")
    assert not math.isfinite(optimiser.step(1.0))
    assert all(torch.equal(named[name], start[name]) for name in named)
    assert not optimiser.mean["matrix"].any()


def test_frozen_parameters_have_no_state():
    named = parameters()
    named["matrix"].requires_grad_(False)
    optimiser = AdamW(named, OptimOptions(learning_rate=1.0))
    assert set(optimiser.tensors()) == {"m.norm", "v.norm", "p.norm"}


def test_warm_up_and_cosine():
    options = OptimOptions(learning_rate=2.0, warmup_steps=4, final_ratio=0.1)
    rates = [learning_rate(options, step, 20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    for step in range(4, 20):
        angle = math.pi * (step - 3) / 16
        expected = 2.0 * (0.1 + 0.9 * (1 + math.cos(angle)) / 2)
        assert rates[step] == pytest.approx(expected)
    assert rates[-1] == pytest.approx(0.2)


def test_warm_up_by_ratio_then_constant():
    options = OptimOptions(learning_rate=1.0, schedule="constant", warmup_ratio=0.03)
    rates = [learning_rate(options, step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert set(rates[3:]) == {1.0}
