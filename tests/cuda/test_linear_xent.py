"""csrc/kernels/cuda/linear_xent.cu against float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from cuda_simulator import Simulator, dtype_value, struct
from gradients import FACTOR
from tolerance import assert_contraction


@dataclass
class Inputs:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def random(cls, rng: torch.Generator, tokens: int, vocab: int, cols: int) -> Inputs:
        targets = torch.randint(0, vocab, (tokens,), generator=rng).int()
        targets[tokens // 2] = -1
        return cls(
            torch.randn((tokens, cols), generator=rng).bfloat16(),
            (torch.randn((vocab, cols), generator=rng) * 0.2).bfloat16(),
            targets,
            torch.randn(tokens, generator=rng),
        )


def linear_xent(
    sim: Simulator,
    inputs: Inputs,
    chunk_tokens: int,
    *,
    scale: float = 1.0,
    with_grad: bool = True,
    hidden_grad: bool = True,
    weight_grad: bool = True,
    dweight_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log_prob, dhidden, dweight)."""
    (tokens, cols), vocab = inputs.hidden.shape, len(inputs.weight)
    log_prob = sim.empty((tokens,), torch.float32)
    dhidden = sim.empty((tokens, cols), torch.bfloat16)
    dweight = sim.empty((vocab, cols), dweight_dtype)
    args = struct("LinearXentArgs")(
        log_prob=log_prob.pointer,
        dhidden=dhidden.pointer if hidden_grad else None,
        dweight=dweight.pointer if weight_grad else None,
        hidden=sim.upload(inputs.hidden).pointer,
        weight=sim.upload(inputs.weight).pointer,
        targets=sim.upload(inputs.targets).pointer,
        grad=sim.upload(inputs.grad).pointer if with_grad else None,
        tokens=tokens,
        vocab=vocab,
        cols=cols,
        chunk_tokens=chunk_tokens,
        hidden_stride=cols,
        weight_stride=cols,
        dhidden_stride=cols,
        dweight_stride=cols,
        scale=scale,
        dweight_dtype=dtype_value(dweight_dtype),
    )
    device = struct("DeviceInfo")(multiprocessors=2)
    workspace = sim.library.qn_cuda_linear_xent_workspace
    workspace.restype = ctypes.c_int64
    size = workspace(ctypes.byref(args), ctypes.byref(device))
    assert size >= min(chunk_tokens, tokens) * vocab * 2
    args.workspace = sim.empty((size,), torch.uint8).pointer
    assert sim.call("qn_cuda_linear_xent", args, device) == 0
    return log_prob.tensor(), dhidden.tensor(), dweight.tensor()


def torch_result(
    inputs: Inputs, dtype: torch.dtype, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With logits of that dtype, as torch computes it."""
    hidden, weight = (x.to(dtype).requires_grad_() for x in (inputs.hidden, inputs.weight))
    logits = hidden @ weight.T
    wide = logits.double() if dtype == torch.float64 else logits.float()
    log_prob = -torch.nn.functional.cross_entropy(
        wide * scale, inputs.targets.long(), ignore_index=-1, reduction="none"
    )
    grads = torch.autograd.grad(log_prob, (hidden, weight), inputs.grad.to(log_prob.dtype))
    return log_prob.detach(), *grads


@pytest.mark.parametrize(
    ("shape", "chunk_tokens"),
    [((5, 72, 64), 8), ((20, 264, 72), 16), ((70, 136, 40), 64), ((33, 8, 136), 11)],
)
@pytest.mark.parametrize("dweight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_matches_reference(sim, rng, shape, chunk_tokens, dweight_dtype, scale):
    inputs = Inputs.random(rng, *shape)
    options = {"scale": scale, "dweight_dtype": dweight_dtype}
    results = linear_xent(sim, inputs, chunk_tokens, **options)
    reference = torch_result(inputs, torch.float64, scale)
    plain = torch_result(inputs, torch.bfloat16, scale)
    for out, expected, base in zip(results, reference, plain, strict=True):
        # Torch's own error is that of bf16 logits and gradients.
        assert_contraction(out, expected, base.to(out.dtype), FACTOR)
    assert results[0][shape[0] // 2] == 0 and not results[1][shape[0] // 2].any()


@pytest.mark.parametrize("hidden_grad", [False, True])
@pytest.mark.parametrize("weight_grad", [False, True])
def test_only_the_gradients_that_are_asked_for(sim, rng, hidden_grad, weight_grad):
    inputs = Inputs.random(rng, 18, 72, 64)
    everything = linear_xent(sim, inputs, 8)
    options = {"hidden_grad": hidden_grad, "weight_grad": weight_grad}
    log_prob, dhidden, dweight = linear_xent(sim, inputs, 8, **options)
    assert torch.equal(log_prob, everything[0])
    if hidden_grad:
        assert torch.equal(dhidden, everything[1])
    else:
        assert torch.isnan(dhidden).all()
    if weight_grad:
        assert torch.equal(dweight, everything[2])
    else:
        assert torch.isnan(dweight).all()


def test_log_probabilities_alone(sim, rng):
    inputs = Inputs.random(rng, 18, 72, 64)
    with_grad = linear_xent(sim, inputs, 8)[0]
    sim.record_launches()
    log_prob, dhidden, dweight = linear_xent(sim, inputs, 8, with_grad=False)
    assert torch.equal(log_prob, with_grad)
    assert torch.isnan(dhidden).all() and torch.isnan(dweight).all()
    assert {launch.name for launch in sim.recorded_launches()} <= {
        "gemm_bf16",
        "gemm_merge",
        "softmax_xent",
    }


def test_one_chunk_holds_all_logits_that_there_ever_are(sim, rng):
    inputs = Inputs.random(rng, 64, 256, 64)
    linear_xent(sim, inputs, 16)
    largest = max(buffer.bytes for buffer in sim.buffers)
    sums = 2 * 2 * 2 * 128 * 128 * 4  # of tiles in parts: two per block, two blocks each on two
    assert largest <= 16 * 256 * 2 + sums


@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_threads_does_not_matter(sim, rng, seed):
    inputs = Inputs.random(rng, 20, 136, 72)
    in_order = linear_xent(sim, inputs, 16)
    sim.configure(seed=seed)
    again = linear_xent(sim, inputs, 16)
    assert all(torch.equal(a, b) for a, b in zip(in_order, again, strict=True))
