"""Gradients by torch's autograd, for comparing with kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tolerance import assert_contraction
from torch import Tensor

FACTOR = 4.0  # of torch's own error that a gradient may have (docs/NUMERICS.md)


def gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], dout: Any
) -> tuple[Tensor, ...]:
    """Of sum(function(*inputs) * dout); several outputs take a tuple of douts."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, dout)


def assert_gradients(
    grads: Sequence[Tensor], function: Callable[..., Any], inputs: Sequence[Tensor], dout: Any
) -> None:
    """Compare with the same function's gradients in float64 and in the inputs' own dtype."""
    base = gradients(function, inputs, dout)
    wide = [x.double() for x in inputs]
    wide_dout = tuple(d.double() for d in dout) if isinstance(dout, tuple) else dout.double()
    ref = gradients(function, wide, wide_dout)
    for grad, expected, plain in zip(grads, ref, base, strict=True):
        assert grad.dtype == plain.dtype
        assert_contraction(grad, expected, plain, FACTOR)
