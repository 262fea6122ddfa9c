"""csrc/kernels/cpu/rope.cpp against float64."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_contraction

from qwen_native import _C, ops


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Hugging Face's rotate_half form, on the first 2 * half elements, in the dtype of cos."""
    half = cos.shape[-1]
    cos, sin = torch.cat([cos, cos], -1)[:, None], torch.cat([sin, sin], -1)[:, None]
    rotated = x[..., : 2 * half].to(cos.dtype)
    swapped = torch.cat([-rotated[..., half:], rotated[..., :half]], -1)
    return torch.cat([rotated * cos + swapped * sin, x[..., 2 * half :].to(cos.dtype)], -1)


def angles(tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequency = 1e4 ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))
    angle = (torch.arange(tokens) + 1000)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "half"),
    [(0, 2, 64, 32), (1, 1, 2, 1), (1, 14, 64, 32), (3, 2, 80, 40), (5, 3, 96, 48), (9, 2, 128, 64)]
    + [(4, 3, 64, 15), (4, 3, 64, 16), (4, 3, 64, 17), (7, 2, 128, 16), (2, 2, 7, 3), (2, 1, 8, 0)],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_matches_reference(isa, rng, tokens, heads, head_dim, half, dtype, scale):
    x = (torch.randn((tokens, heads, head_dim), generator=rng) * scale).to(dtype)
    cos, sin = angles(tokens, half)
    out = ops.rope(x.clone(), cos, sin)
    assert_contraction(out, rotate(x, cos.double(), sin.double()), rotate(x, cos, sin).to(dtype))
    assert torch.equal(out[..., 2 * half :], x[..., 2 * half :])


def test_a_slice_of_a_wider_row_is_rotated_alone(isa, rng):
    storage = torch.randn((5, 300), generator=rng)
    before = storage.clone()
    cos, sin = angles(5, 20)
    x = storage[:, 50:250].view(5, 4, 50)
    expected = rotate(x.clone(), cos.double(), sin.double())
    base = rotate(x.clone(), cos, sin)
    assert ops.rope(x, cos, sin) is x
    assert_contraction(x, expected, base)
    assert torch.equal(storage[:, :50], before[:, :50])
    assert torch.equal(storage[:, 250:], before[:, 250:])


def test_a_token_does_not_depend_on_the_others(isa, rng):
    x = torch.randn((33, 4, 64), generator=rng)
    cos, sin = angles(33, 32)
    together = ops.rope(x.clone(), cos, sin)
    alone = torch.cat(
        [ops.rope(x[t : t + 1].clone(), cos[t : t + 1], sin[t : t + 1]) for t in range(33)]
    )
    assert torch.equal(together, alone)
    threads = _C.op_threads()
    _C.set_op_threads(1 if threads > 1 else 2)
    assert torch.equal(together, ops.rope(x.clone(), cos, sin))
    _C.set_op_threads(threads)


def test_nan_and_infinity_stay_in_their_pair(isa):
    x = torch.ones((1, 1, 64))
    x[0, 0, 3], x[0, 0, 40] = float("nan"), float("inf")
    out = ops.rope(x, *angles(1, 32))[0, 0]
    bad = ~torch.isfinite(out)
    assert bad.nonzero().flatten().tolist() == [3, 8, 35, 40]


def test_wrong_shapes_are_named():
    x, (cos, sin) = torch.ones(2, 3, 8), angles(2, 4)
    with pytest.raises(
        ValueError, match=r"\[rope\] cos is f32\[2, 5\], expected f32\[2, at most 4\]"
    ):
        ops.rope(x, torch.ones(2, 5), sin)
    with pytest.raises(
        ValueError, match=r"\[rope\] sin is f32\[2, 3\], expected f32\[2, 4\] as cos"
    ):
        ops.rope(x, cos, sin[:, :3].contiguous())
    with pytest.raises(ValueError, match=r"\[rope\] x has rank 2, expected 3"):
        ops.rope(x[0], cos, sin)
