"""qwen_native/autograd.py against the float64 definitions of qwen_native/reference.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import tiny_training
import torch
from gradients import assert_gradients, gradients
from tolerance import assert_contraction
from torch import Tensor

from qwen_native import autograd, reference

FLOATS = [torch.float32, torch.bfloat16]


class Op(NamedTuple):
    """An op with inputs to differentiate and others, all of them made for one dtype."""

    name: str
    inputs: tuple[Tensor, ...]
    rest: tuple[Any, ...]

    def call(self, module: Any) -> Callable[..., Any]:
        return lambda *inputs: getattr(module, self.name)(*inputs, *self.rest)


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(tokens)[:, None] * 100.0 ** -(torch.arange(half) / half)
    return angle.cos(), angle.sin()


def cases(dtype: torch.dtype) -> dict[str, Op]:
    rng = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    targets = torch.tensor([3, 70, 0, 12, 11, 4, 66])
    ignored = targets.masked_fill(torch.arange(7) == 2, -100)
    head = (random(7, 24), random(71, 24))
    tokens = 23
    heads = (random(90, 4, 24), random(90, 2, 24), random(90, 2, 24))
    ends = torch.tensor([0, 9, 90], dtype=torch.int32)
    return {
        "rms_norm": Op("rms_norm", (random(33, 40), random(40)), (1e-5,)),
        "rms_norm of heads": Op("rms_norm", (random(5, 3, 24)[:, 1:], random(24)), (1e-5,)),
        "add_rms_norm": Op("add_rms_norm", (random(9, 40), random(9, 40), random(40)), (1e-5,)),
        "rope": Op("rope", (random(tokens, 3, 20),), angles(tokens, 8)),
        "linear": Op("linear", (random(9, 40), random(30, 40), random(30)), ()),
        "linear without bias": Op("linear", (random(2, 5, 40), random(30, 40)), ()),
        "attention": Op("attention", heads, (ends, 0.2, 70)),
        "swiglu": Op("swiglu", (random(9, 50), random(9, 50)), ()),
        "linear_cross_entropy": Op("linear_cross_entropy", head, (ignored,)),
        "linear_log_prob": Op("linear_log_prob", head, (targets, 0.8)),
    }


CASES = list(cases(torch.float32))
HEADS = ("linear_cross_entropy", "linear_log_prob")


def douts_of(outputs: Any) -> Any:
    rng = torch.Generator().manual_seed(8)
    if isinstance(outputs, tuple):
        return tuple(torch.randn(o.shape, generator=rng).to(o.dtype) for o in outputs)
    return torch.randn(outputs.shape, generator=rng).to(outputs.dtype)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """The head's ops take two parts for seven tokens."""
    monkeypatch.setattr(autograd, "_LOGITS_BYTES", 0)
    monkeypatch.setattr(autograd, "_LARGEST_NUMBER_OF_PARTS", 2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_match_the_reference(isa, name, dtype):
    op = cases(dtype)[name]
    outputs = op.call(autograd)(*op.inputs)
    wide = op.call(reference)(*(x.double() for x in op.inputs))
    base = op.call(reference)(*op.inputs)
    if not isinstance(outputs, tuple):
        outputs, wide, base = (outputs,), (wide,), (base,)
    for out, ref, plain in zip(outputs, wide, base, strict=True):
        assert out.dtype == plain.dtype
        if op.name in HEADS and dtype == torch.bfloat16:
            # Torch keeps the logits in float32 in `reference`; a model's own are bfloat16.
            plain = narrow_logits(op)
        assert_contraction(out, ref, plain)
    dout = douts_of(op.call(autograd)(*op.inputs))
    grads = gradients(op.call(autograd), op.inputs, dout)
    if op.name in HEADS and dtype == torch.bfloat16:
        return assert_narrow_gradients(op, grads, dout)
    assert_gradients(grads, op.call(reference), op.inputs, dout)


def narrow_head(op: Op) -> Callable[[Tensor, Tensor], Tensor]:
    """The op as transformers computes it: logits in the model's dtype, then float32."""

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        if op.name == "linear_cross_entropy":
            return torch.nn.functional.cross_entropy(logits, op.rest[0], reduction="sum")
        targets, temperature = op.rest
        return -torch.nn.functional.cross_entropy(logits / temperature, targets, reduction="none")

    return call


def narrow_logits(op: Op) -> Tensor:
    return narrow_head(op)(*op.inputs)


def assert_narrow_gradients(op: Op, grads: tuple[Tensor, ...], dout: Tensor) -> None:
    ref = gradients(op.call(reference), [x.double() for x in op.inputs], dout.double())
    base = gradients(narrow_head(op), op.inputs, dout)
    for grad, expected, plain in zip(grads, ref, base, strict=True):
        assert_contraction(grad, expected, plain, 3.0)


@pytest.mark.parametrize("name", CASES)
def test_only_the_gradients_that_are_asked_for(name):
    op = cases(torch.float32)[name]
    dout = douts_of(op.call(autograd)(*op.inputs))
    expected = gradients(op.call(autograd), op.inputs, dout)
    for i, x in enumerate(op.inputs):
        inputs = [y.detach() for y in op.inputs]
        inputs[i] = x.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(op.call(autograd)(*inputs), [inputs[i]], dout)
        assert torch.equal(grad, expected[i])
    with torch.no_grad():
        outputs = op.call(autograd)(*op.inputs)
    assert not any(o.requires_grad for o in (outputs if isinstance(outputs, tuple) else [outputs]))


@pytest.mark.parametrize("name", CASES)
def test_operator_registration(name):
    op = cases(torch.float32)[name]
    inputs = [x.detach().clone().requires_grad_() for x in op.inputs]
    rest = op.rest
    if op.name == "linear_cross_entropy":
        rest = (*op.rest, -100, True, True)
    elif name == "linear without bias":
        rest = (None,)
    torch.library.opcheck(getattr(torch.ops.qwen_native, op.name).default, (*inputs, *rest))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compile_traces_through_the_whole_model():
    """Two generations, which together use all ops but one, without a break in the graph."""
    tokens = torch.arange(20) * 7
    positions = torch.cat([torch.arange(8), torch.arange(12)])
    ends = torch.tensor([0, 8, 20], dtype=torch.int32)
    qwen3 = {"architecture": "qwen3", "qk_norm": True, "qkv_bias": False}
    for changes in ({}, qwen3):
        model = tiny_training.model(**changes, kernels="native")
        parameters = list(model.parameters())
        rest = (tokens, positions, ends, tokens.roll(-1))
        expected = torch.autograd.grad(model(*rest), parameters)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        grads = torch.autograd.grad(compiled(*rest), parameters)
        for grad, plain in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, plain)


def test_compile_traces_through_log_probabilities():
    op = cases(torch.float32)["linear_log_prob"]
    call = op.call(autograd)
    dout = douts_of(call(*op.inputs))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    grads = gradients(compiled, op.inputs, dout)
    for grad, plain in zip(grads, gradients(call, op.inputs, dout), strict=True):
        torch.testing.assert_close(grad, plain)


def test_gradients_that_were_scaled_in_place_are_not_scaled_twice() -> None:
    hidden = torch.randn(3, 8, requires_grad=True)
    loss = autograd.linear_cross_entropy(hidden, torch.randn(5, 8), torch.tensor([0, 4, 2]))
    loss.backward(torch.tensor(0.5), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_wrong_inputs_are_named():
    hidden, weight = torch.ones(3, 8), torch.ones(5, 8)
    targets = torch.tensor([0, 5, -100])
    with pytest.raises(ValueError, match=r"targets\[1\] is 5, expected 0 to 4 or the ignore_index"):
        autograd.linear_cross_entropy(hidden, weight, targets)
    with pytest.raises(ValueError, match=r"targets\[2\] is -100, expected 0 to 4$"):
        autograd.linear_log_prob(hidden, weight, targets.clamp(max=4))
    with pytest.raises(ValueError, match=r"hidden is torch.float32, expected torch.bfloat16"):
        autograd.linear_cross_entropy(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"targets is torch.int64 \[2\], expected int64 \[3\]"):
        autograd.linear_cross_entropy(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match=r"temperature is 0.0, expected a positive"):
        autograd.linear_log_prob(hidden, weight, targets, 0.0)
