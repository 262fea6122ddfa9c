"""csrc/kernels/cuda/rms_norm.cu against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_simulator import CUDA, Simulator, dtype_value, struct
from tolerance import assert_pointwise

SHAPES = [
    (0, 64),
    (1, 1),
    (1, 896),
    (3, 17),
    (2, 63),
    (2, 64),
    (2, 65),
    (3, 128),
    (2, 2056),
    (1, 4096),
]
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


def rms_norm(
    sim: Simulator,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, residual after the call); rows lie `padding` elements further apart than needed."""
    rows, cols = x.shape

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, padding))

    x_buffer, weight_buffer = sim.upload(padded(x)), sim.upload(weight)
    residual_buffer = None if residual is None else sim.upload(padded(residual))
    out = sim.empty((rows, cols + padding), x.dtype)
    args = struct("RmsNormArgs")(
        out=out.pointer,
        x=x_buffer.pointer,
        residual=residual_buffer.pointer if residual_buffer else None,
        weight=weight_buffer.pointer,
        cols=cols,
        out_stride=cols + padding,
        x_stride=cols + padding,
        residual_stride=cols + padding,
        eps=EPS,
        dtype=dtype_value(x.dtype),
        weight_dtype=dtype_value(weight.dtype),
    )
    assert sim.call("qn_cuda_rms_norm", args, rows) == 0
    if padding:
        assert torch.isnan(out.tensor()[:, cols:]).all(), "wrote beyond a row"
    return out.tensor()[:, :cols], residual_buffer.tensor()[:, :cols] if residual_buffer else None


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The Hugging Face norm: float32 inside, rounded to the input's dtype before the weight."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (weight.to(x.dtype) * normed.to(x.dtype)).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_matches_reference(sim, rng, shape, dtype, weight_dtype, scale):
    x = (torch.randn(shape, generator=rng) * scale).to(dtype)
    weight = torch.randn(shape[1], generator=rng).to(weight_dtype)
    out, _ = rms_norm(sim, x, weight)
    assert_pointwise(out, reference(x, weight), plain(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_is_added_in_place(sim, rng, shape, dtype):
    x = torch.randn(shape, generator=rng).to(dtype)
    residual = torch.randn(shape, generator=rng).to(dtype)
    weight = torch.randn(shape[1], generator=rng)
    total = (residual.float() + x.float()).to(dtype)
    out, after = rms_norm(sim, x, weight, residual)
    assert torch.equal(after, total)
    assert_pointwise(out, reference(total, weight), plain(total, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [3, 8])
def test_rows_may_be_strided(sim, rng, dtype, padding):
    x = torch.randn((5, 72), generator=rng).to(dtype)
    weight = torch.randn(72, generator=rng).to(dtype)
    out, _ = rms_norm(sim, x, weight, padding=padding)
    assert_pointwise(out, reference(x, weight), plain(x, weight))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_order_of_threads_does_not_matter(sim, rng, seed):
    x, residual = torch.randn((2, 3, 904), generator=rng).bfloat16()
    weight = torch.randn(904, generator=rng).bfloat16()
    in_order = rms_norm(sim, x, weight, residual)
    sim.configure(seed=seed)
    permuted = rms_norm(sim, x, weight, residual)
    assert torch.equal(in_order[0], permuted[0]) and torch.equal(in_order[1], permuted[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_is_the_minimum(sim, rng, dtype):
    rows, cols = 4, 4096
    x = torch.randn((rows, cols), generator=rng).to(dtype)
    rms_norm(sim, x, torch.ones(cols, dtype=dtype))
    counted = sim.counters()
    row_bytes = cols * dtype.itemsize
    assert 32 * counted.distinct_load_sectors == (rows + 1) * row_bytes
    assert 32 * counted.distinct_store_sectors == rows * row_bytes
    assert counted.load_sectors == counted.load_sectors_needed
    assert counted.store_sectors == counted.store_sectors_needed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 904), (2, 13)])
def test_ptx_agrees(sim, rng, shape, dtype, weight_dtype):
    sim.compare_with_ptx(CUDA / "rms_norm.cu")
    x, residual = torch.randn((2, *shape), generator=rng).to(dtype)
    rms_norm(sim, x, torch.randn(shape[1], generator=rng).to(weight_dtype), residual)
