"""csrc/kernels/cpu/softmax_xent.cpp against float64."""

from __future__ import annotations

import pytest
import torch
from gradients import FACTOR
from tolerance import assert_contraction

from qwen_native import _C, ops

SHAPES = [(0, 5), (60, 2), (13, 17), (5, 63), (2, 64), (2, 65), (4, 1023), (3, 1025), (2, 30011)]


def log_prob(logits: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
    picked = torch.log_softmax(logits * scale, -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets < 0, torch.zeros_like(picked), picked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("spread", "scale"), [(1e-2, 1.0), (4.0, 0.75), (100.0, 1.0)])
def test_matches_autograd(isa, rng, shape, dtype, spread, scale):
    logits = (torch.randn(shape, generator=rng) * spread).to(dtype)
    targets = torch.randint(0, shape[1], shape[:1], generator=rng)
    targets[1::3] = -1
    grad = torch.randn(shape[0], generator=rng)
    before = logits.clone()
    plain, wide = (x.requires_grad_() for x in (logits.float().clone(), logits.double()))
    base, ref = log_prob(plain, targets, scale), log_prob(wide, targets, scale)
    out = ops.softmax_xent(logits, targets.int(), scale)
    assert torch.equal(logits, before)
    assert_contraction(out, ref.detach(), base.detach())
    assert torch.equal(ops.softmax_xent(logits, targets.int(), scale, grad), out)
    base.backward(grad)
    ref.backward(grad.double())
    assert_contraction(logits, wide.grad, plain.grad.to(dtype), FACTOR)
    assert not logits[1::3].any()


def test_rows_may_be_strided_and_threads_change_nothing(isa, rng):
    storage = torch.randn((7, 2000), generator=rng)
    logits, targets = storage[:, :1500], torch.arange(7, dtype=torch.int32)
    expected = logits.clone()
    first = ops.softmax_xent(expected, targets, 1.0, torch.ones(7))
    beside = storage[:, 1500:].clone()
    threads = _C.op_threads()
    _C.set_op_threads(1 if threads > 1 else 2)
    second = ops.softmax_xent(logits, targets, 1.0, torch.ones(7))
    _C.set_op_threads(threads)
    assert torch.equal(first, second)
    assert torch.equal(logits, expected)
    assert torch.equal(storage[:, 1500:], beside)


def test_nan_stays_in_its_row(isa, rng):
    logits = torch.randn((3, 100), generator=rng)
    logits[1, 70] = float("nan")
    out = ops.softmax_xent(logits, torch.zeros(3, dtype=torch.int32), 1.0, torch.ones(3))
    assert out.isnan().tolist() == [False, True, False]
    assert logits.isnan().any(1).tolist() == [False, True, False]


def test_wrong_targets_are_named():
    logits = torch.ones(2, 4)
    for target in (4, -2):
        with pytest.raises(ValueError, match=rf"targets\[1\] is {target}, expected -1 to 3"):
            ops.softmax_xent(logits, torch.tensor([0, target], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\[softmax_xent\] scale is 0, expected a positive"):
        ops.softmax_xent(logits, torch.zeros(2, dtype=torch.int32), 0.0)
