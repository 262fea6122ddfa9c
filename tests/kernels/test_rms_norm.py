"""csrc/kernels/cpu/rms_norm.cpp against float64."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_pointwise

from qwen_native import ops

SHAPES = [(0, 64), (1, 1), (1, 896), (3, 17), (7, 63), (7, 64), (7, 65), (33, 128), (5, 2048)]


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def plain(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The Hugging Face norm: float32 inside, rounded to the input's dtype before the weight."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight.to(x.dtype) * normed.to(x.dtype)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_matches_reference(isa, rng, shape, dtype, weight_dtype, scale):
    x = (torch.randn(shape, generator=rng) * scale).to(dtype)
    weight = torch.randn(shape[1], generator=rng).to(weight_dtype)
    out = ops.rms_norm(x, weight, 1e-6)
    assert_pointwise(out, reference(x, weight, 1e-6), plain(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_is_added_in_place(isa, rng, shape, dtype):
    x = torch.randn(shape, generator=rng).to(dtype)
    residual = torch.randn(shape, generator=rng).to(dtype)
    weight = torch.randn(shape[1], generator=rng)
    total = (residual.float() + x.float()).to(dtype)
    out = ops.rms_norm(x, weight, 1e-5, residual=residual)
    assert torch.equal(residual, total)
    assert_pointwise(out, reference(total, weight, 1e-5), plain(total, weight, 1e-5))


def test_rows_may_be_strided(isa, rng):
    storage = torch.randn((5, 100), generator=rng)
    x, weight = storage[:, :70], torch.randn(70, generator=rng)
    assert_pointwise(ops.rms_norm(x, weight), reference(x, weight, 1e-6), plain(x, weight, 1e-6))


def test_nan_stays_in_its_row(isa, rng):
    x = torch.randn((3, 40), generator=rng)
    x[1, 7] = float("nan")
    out = ops.rms_norm(x, torch.ones(40))
    assert torch.isnan(out[1]).all()
    assert torch.isfinite(out[[0, 2]]).all()


def test_mismatched_weight_is_named():
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight is f32\[5\], expected 4"):
        ops.rms_norm(torch.ones(2, 4), torch.ones(5))
