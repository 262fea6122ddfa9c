"""csrc/kernels/cuda/rms_norm_bwd.cu against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_simulator import CUDA, Simulator, dtype_value, struct
from gradients import assert_gradients

from qwen_native import reference

# Rows of one warp and of the whole block, around the 32 rows of a share, with and without tails.
SHAPES = [
    (40, 2),
    (5, 17),
    (33, 128),
    (65, 256),
    (3, 257),
    (34, 904),
    (2, 2048),
    (1, 2056),
    (2, 8192),
]
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


def rms_norm_bwd(
    sim: Simulator,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual_grad: torch.Tensor | None = None,
    padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dweight); rows lie `padding` elements further apart than needed."""
    rows, cols = x.shape

    def padded(tensor: torch.Tensor) -> int:
        return sim.upload(torch.nn.functional.pad(tensor, (0, padding))).pointer

    dx = sim.empty((rows, cols + padding), x.dtype)
    dweight = sim.empty((cols,), weight.dtype)
    args = struct("RmsNormBwdArgs")(
        dx=dx.pointer,
        dweight=dweight.pointer,
        partial=sim.empty((-(-rows // 32), cols), torch.float32).pointer,
        dy=padded(dy),
        x=padded(x),
        residual_grad=None if residual_grad is None else padded(residual_grad),
        weight=sim.upload(weight).pointer,
        rows=rows,
        cols=cols,
        dx_stride=cols + padding,
        dy_stride=cols + padding,
        x_stride=cols + padding,
        residual_stride=cols + padding,
        eps=EPS,
        dtype=dtype_value(x.dtype),
        weight_dtype=dtype_value(weight.dtype),
    )
    assert sim.call("qn_cuda_rms_norm_bwd", args) == 0
    if padding:
        assert torch.isnan(dx.tensor()[:, cols:]).all(), "wrote beyond a row"
    return dx.tensor()[:, :cols], dweight.tensor()


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return reference.rms_norm(x, weight, EPS)


def norm_and_sum(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return norm(x, weight), x * 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("scale", "weight_dtype"), [(1e-3, torch.float32), (1.0, torch.bfloat16), (1e3, torch.float32)]
)
def test_matches_autograd(sim, rng, shape, dtype, weight_dtype, scale):
    x = (torch.randn(shape, generator=rng) * scale).to(dtype)
    dy = torch.randn(shape, generator=rng).to(dtype)
    weight = torch.randn(shape[1], generator=rng).to(weight_dtype)
    assert_gradients(rms_norm_bwd(sim, dy, x, weight), norm, (x, weight), dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 96), (3, 600)])
@pytest.mark.parametrize("padding", [0, 3, 8])
def test_the_residuals_gradient_is_added(sim, rng, dtype, shape, padding):
    x, dy, other = torch.randn((3, *shape), generator=rng).to(dtype)
    weight = torch.randn(shape[1], generator=rng)
    grads = rms_norm_bwd(sim, dy, x, weight, other, padding)
    assert_gradients(grads, norm_and_sum, (x, weight), (dy, other))


def test_no_rows_give_no_gradient_of_the_weight(sim):
    empty = torch.empty(0, 40)
    _, dweight = rms_norm_bwd(sim, empty, empty, torch.ones(40))
    assert torch.equal(dweight, torch.zeros(40))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("cols", [128, 300])
def test_order_of_threads_does_not_matter(sim, rng, seed, cols):
    x, dy = torch.randn((2, 70, cols), generator=rng).bfloat16()
    weight = torch.randn(cols, generator=rng).bfloat16()
    in_order = rms_norm_bwd(sim, dy, x, weight)
    sim.configure(seed=seed)
    permuted = rms_norm_bwd(sim, dy, x, weight)
    assert torch.equal(in_order[0], permuted[0]) and torch.equal(in_order[1], permuted[1])


@pytest.mark.parametrize("cols", [128, 2048])
def test_traffic_is_within_5_percent(sim, rng, cols):
    rows = 64
    x, dy, other = torch.randn((3, rows, cols), generator=rng).bfloat16()
    weight = torch.ones(cols, dtype=torch.bfloat16)
    rms_norm_bwd(sim, dy, x, weight, other)
    counted, row_bytes = sim.counters(), 2 * cols
    loaded, stored = (3 * rows + 1) * row_bytes, (rows + 1) * row_bytes
    moved = 32 * (counted.distinct_load_sectors + counted.distinct_store_sectors)
    assert loaded + stored <= moved <= 1.05 * (loaded + stored)
    assert counted.load_sectors == counted.load_sectors_needed
    # A block's share of dweight leaves as halves of sectors, which the L2 cache joins.
    assert counted.store_sectors <= 1.08 * counted.store_sectors_needed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 104), (2, 13), (2, 520)])
def test_ptx_agrees(sim, rng, shape, dtype):
    sim.compare_with_ptx(CUDA / "rms_norm_bwd.cu")
    x, dy, other = torch.randn((3, *shape), generator=rng).to(dtype)
    rms_norm_bwd(sim, dy, x, torch.randn(shape[1], generator=rng).to(dtype), other)
