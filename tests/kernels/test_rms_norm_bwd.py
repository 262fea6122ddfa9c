"""csrc/kernels/cpu/rms_norm_bwd.cpp against float64."""

from __future__ import annotations

import pytest
import torch
from gradients import assert_gradients

from qwen_native import _C, ops, reference

SHAPES = [(40, 2), (1, 896), (3, 17), (32, 63), (33, 64), (70, 65), (161, 130)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("scale", "weight_dtype"), [(1e-3, torch.float32), (1.0, torch.bfloat16), (1e3, torch.float32)]
)
def test_matches_autograd(isa, rng, shape, dtype, weight_dtype, scale):
    x = (torch.randn(shape, generator=rng) * scale).to(dtype)
    dy = torch.randn(shape, generator=rng).to(dtype)
    weight = torch.randn(shape[1], generator=rng).to(weight_dtype)
    grads = ops.rms_norm_bwd(dy, x, weight, 1e-6)
    assert_gradients(grads, lambda x, w: reference.rms_norm(x, w, 1e-6), (x, weight), dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residuals_gradient_is_added(isa, rng, dtype):
    x, dy, other = torch.randn((3, 37, 100), generator=rng).to(dtype)
    weight = torch.randn(100, generator=rng)
    grads = ops.rms_norm_bwd(dy, x, weight, 1e-5, other)

    def norm_and_sum(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.rms_norm(x, weight, 1e-5), x * 1

    assert_gradients(grads, norm_and_sum, (x, weight), (dy, other))


def test_no_rows_give_no_gradient_of_the_weight(isa):
    empty, weight = torch.empty(0, 40), torch.ones(40)
    dx, dweight = ops.rms_norm_bwd(empty, empty, weight)
    assert dx.shape == (0, 40)
    assert torch.equal(dweight, torch.zeros(40))


def test_rows_may_be_strided_and_threads_change_nothing(isa, rng):
    x, dy = torch.randn((2, 333, 90), generator=rng)[..., :70]
    weight = torch.randn(70, generator=rng)
    expected = ops.rms_norm_bwd(dy.contiguous(), x.contiguous(), weight)
    threads = _C.op_threads()
    _C.set_op_threads(1 if threads > 1 else 2)
    grads = ops.rms_norm_bwd(dy, x, weight)
    _C.set_op_threads(threads)
    assert torch.equal(grads[0], expected[0])
    assert torch.equal(grads[1], expected[1])


def test_wrong_shapes_are_named():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"\[rms_norm_bwd\] weight is f32\[5\], expected 4"):
        ops.rms_norm_bwd(x, x, torch.ones(5))
    with pytest.raises(ValueError, match=r"\[rms_norm_bwd\] dy is f32\[3, 4\], expected f32\[2, 4"):
        ops.rms_norm_bwd(torch.ones(3, 4), x, torch.ones(4))
