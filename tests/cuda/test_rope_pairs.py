"""csrc/kernels/cuda/rope_pairs.cu against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_simulator import CUDA, Simulator, dtype_value, struct
from tolerance import assert_contraction

from qwen_native import reference

DTYPES = [torch.float32, torch.bfloat16]
# tokens, heads, head_dim, half: whole vectors, a rotation of a part, and pairs that fill no vector
SHAPES = [
    (0, 2, 64, 32),
    (3, 14, 64, 32),
    (2, 17, 80, 40),
    (5, 3, 128, 32),
    (2, 5, 10, 5),
    (1, 1, 2, 1),
]


def angles(rng: torch.Generator, tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand((tokens, half), generator=rng) * 6
    return angle.cos(), angle.sin()


def rope_pairs(
    sim: Simulator,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    inverse: bool = False,
    padding: int = 0,
) -> torch.Tensor:
    """Heads lie `padding` elements further apart than needed."""
    tokens, heads, head_dim = x.shape
    buffer = sim.upload(torch.nn.functional.pad(x, (0, padding)))
    args = struct("RopeArgs")(
        x=buffer.pointer,
        cos=sim.upload(cos).pointer,
        sin=sim.upload(sin).pointer,
        heads=heads,
        half=cos.shape[1],
        token_stride=heads * (head_dim + padding),
        head_stride=head_dim + padding,
        cos_stride=cos.shape[1],
        sin_stride=sin.shape[1],
        dtype=dtype_value(x.dtype),
    )
    assert sim.call("qn_cuda_rope_pairs", args, tokens, inverse) == 0
    assert not buffer.tensor()[..., head_dim:].any(), "wrote beyond a head"
    return buffer.tensor()[..., :head_dim]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_matches_reference(sim, rng, dtype, shape, inverse):
    tokens, heads, head_dim, half = shape
    x = torch.randn((tokens, heads, head_dim), generator=rng).to(dtype)
    cos, sin = angles(rng, tokens, half)
    out = rope_pairs(sim, x, cos, sin, inverse)
    if inverse:
        sin = -sin
    expected = reference.rope(x.double(), cos.double(), sin.double())
    assert_contraction(out, expected, reference.rope(x, cos, sin))
    assert torch.equal(out[..., 2 * half :], x[..., 2 * half :])


def test_inverse_is_the_gradient(sim, rng):
    x, dout = torch.randn((2, 3, 4, 16), generator=rng)
    cos, sin = angles(rng, 3, 8)
    leaf = x.double().requires_grad_()
    reference.rope(leaf, cos.double(), sin.double()).backward(dout.double())
    assert leaf.grad is not None
    base = reference.rope(dout, cos, -sin)
    assert_contraction(rope_pairs(sim, dout, cos, sin, inverse=True), leaf.grad, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [3, 8])
def test_heads_may_be_strided(sim, rng, dtype, padding):
    x = torch.randn((2, 6, 64), generator=rng).to(dtype)
    cos, sin = angles(rng, 2, 32)
    assert torch.equal(rope_pairs(sim, x, cos, sin, padding=padding), rope_pairs(sim, x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_is_within_5_percent(sim, rng, dtype):
    tokens, heads, head_dim = 2, 32, 128
    cos, sin = angles(rng, tokens, head_dim // 2)
    rope_pairs(sim, torch.randn((tokens, heads, head_dim), generator=rng).to(dtype), cos, sin)
    counted, size = sim.counters(), tokens * heads * head_dim * dtype.itemsize
    tables = tokens * head_dim * 4
    assert 32 * counted.distinct_load_sectors == size + tables
    assert 32 * counted.store_sectors == size
    assert counted.store_sectors == counted.store_sectors_needed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [5, 16])
def test_ptx_agrees(sim, rng, dtype, half):
    sim.compare_with_ptx(CUDA / "rope_pairs.cu")
    cos, sin = angles(rng, 2, half)
    rope_pairs(sim, torch.randn((2, 3, 2 * half), generator=rng).to(dtype), cos, sin, inverse=True)
