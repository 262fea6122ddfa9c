"""csrc/kernels/cuda/softmax_xent.cu against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_simulator import CUDA, Simulator, dtype_value, struct
from tolerance import assert_contraction

DTYPES = [torch.float32, torch.bfloat16]


def softmax_xent(
    sim: Simulator,
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: float,
    grad: torch.Tensor | None = None,
    padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log_prob, the logits' gradient, or the logits as they are without `grad`)."""
    rows, vocab = logits.shape
    buffer = sim.upload(torch.nn.functional.pad(logits, (0, padding)))
    log_prob = sim.empty((rows,), torch.float32)
    args = struct("SoftmaxXentArgs")(
        log_prob=log_prob.pointer,
        logits=buffer.pointer,
        targets=sim.upload(targets.int()).pointer,
        grad=None if grad is None else sim.upload(grad).pointer,
        vocab=vocab,
        logits_stride=vocab + padding,
        scale=scale,
        dtype=dtype_value(logits.dtype),
    )
    assert sim.call("qn_cuda_softmax_xent", args, rows) == 0
    assert not buffer.tensor()[:, vocab:].any(), "wrote beyond a row"
    return log_prob.tensor(), buffer.tensor()[:, :vocab]


def torch_result(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        leaf * scale, targets.long(), ignore_index=-1, reduction="none"
    )
    loss.backward(-grad.to(loss.dtype))
    assert leaf.grad is not None
    return -loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 3, 8, 500, 4099])
@pytest.mark.parametrize(("size", "scale"), [(0.1, 1.0), (3.0, 0.7), (100.0, 1.0)])
def test_matches_reference(sim, rng, dtype, vocab, size, scale):
    logits = (torch.randn((12, vocab), generator=rng) * size).to(dtype)
    targets = torch.randint(0, vocab, (12,), generator=rng)
    targets[2] = -1
    grad = torch.randn(12, generator=rng)
    reference = torch_result(logits.double(), targets, scale, grad)
    plain = torch_result(logits.float(), targets, scale, grad)
    log_prob, gradient = softmax_xent(sim, logits, targets, scale, grad)
    assert_contraction(log_prob, reference[0], plain[0])
    assert_contraction(gradient, reference[1], plain[1].to(dtype))
    assert log_prob[2] == 0 and not gradient[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 3, 8])
def test_logits_stay_without_grad(sim, rng, dtype, padding):
    logits = torch.randn((3, 72), generator=rng).to(dtype)
    targets = torch.tensor([71, -1, 0])
    log_prob, after = softmax_xent(sim, logits, targets, 1.0, padding=padding)
    assert torch.equal(after, logits)
    reference, _ = torch_result(logits.double(), targets, 1.0, torch.ones(3))
    plain, _ = torch_result(logits.float(), targets, 1.0, torch.ones(3))
    assert_contraction(log_prob, reference, plain)
    with_grad, _ = softmax_xent(sim, logits, targets, 1.0, torch.ones(3), padding)
    assert torch.equal(with_grad, log_prob)


def test_forbidden_tokens(sim):
    logits = torch.full((2, 600), -torch.inf)
    logits[:, 5], logits[:, 599] = 1.0, 2.0
    log_prob, grad = softmax_xent(sim, logits, torch.tensor([5, 599]), 1.0, torch.ones(2))
    share = torch.tensor([1.0, 2.0]).softmax(0)
    assert torch.allclose(log_prob, share.log())
    assert torch.allclose(grad[0, [5, 599]], torch.tensor([1 - share[0], -share[1]]))
    assert torch.count_nonzero(grad) == 4


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_order_of_threads_does_not_matter(sim, rng, seed):
    logits, targets = torch.randn((2, 3000), generator=rng), torch.tensor([0, 2999])
    in_order = softmax_xent(sim, logits, targets, 1.0, torch.ones(2))
    sim.configure(seed=seed)
    again = softmax_xent(sim, logits, targets, 1.0, torch.ones(2))
    assert torch.equal(in_order[0], again[0]) and torch.equal(in_order[1], again[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_grad", [False, True])
def test_traffic_is_within_5_percent(sim, rng, dtype, with_grad):
    logits = torch.randn((2, 16384), generator=rng).to(dtype)
    grad = torch.ones(2) if with_grad else None
    softmax_xent(sim, logits, torch.tensor([1, 2]), 1.0, grad)
    counted, size = sim.counters(), logits.numel() * dtype.itemsize
    assert counted.load_bytes <= 1.05 * size * (2 if with_grad else 1)
    assert counted.load_sectors <= 1.05 * size * (2 if with_grad else 1) / 32
    assert 32 * counted.distinct_load_sectors <= 1.01 * size
    assert 32 * counted.store_sectors <= size * with_grad + 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_ptx_agrees(sim, rng, dtype):
    sim.compare_with_ptx(CUDA / "softmax_xent.cu")
    logits = torch.randn((2, 67), generator=rng).to(dtype)
    softmax_xent(sim, logits, torch.tensor([66, -1]), 0.9, torch.ones(2))
