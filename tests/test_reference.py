"""The definitions in qwen_native/reference.py against torch's own operators, in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen_native import reference


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rms_norm():
    x, weight = random(5, 3, 16), random(16, seed=1)
    torch.testing.assert_close(
        reference.rms_norm(x, weight, 1e-3), F.rms_norm(x, (16,), weight, 1e-3)
    )


def test_add_rms_norm():
    x, residual, weight = random(7, 8), random(7, 8, seed=1), random(8, seed=2)
    out, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(out, F.rms_norm(x + residual, (8,), weight, 1e-6))


def test_rope_is_a_complex_rotation_and_leaves_the_rest():
    x, angles = random(5, 2, 14), random(5, 4, seed=1).float()
    out = reference.rope(x, angles.cos(), angles.sin())
    turned = torch.complex(x[..., :4], x[..., 4:8])
    turned = turned * torch.complex(angles.cos().double(), angles.sin().double())[:, None]
    expected = torch.cat([turned.real, turned.imag, x[..., 8:]], -1)
    torch.testing.assert_close(out, expected)


def test_swiglu():
    gate, up = random(3, 9), random(3, 9, seed=1)
    torch.testing.assert_close(reference.swiglu(gate, up), F.silu(gate) * up)


def test_linear():
    x, weight, bias = random(3, 9), random(5, 9, seed=1), random(5, seed=2)
    torch.testing.assert_close(reference.linear(x, weight, bias), x @ weight.T + bias)
    torch.testing.assert_close(reference.linear(x, weight), x @ weight.T)


def test_attention_of_documents_with_shared_heads_and_window():
    lengths, heads, kv_heads, window = [1, 6, 11], 6, 2, 4
    total = sum(lengths)
    q = random(total, heads, 8)
    k, v = random(total, kv_heads, 8, seed=1), random(total, kv_heads, 8, seed=2)
    ends = torch.tensor([0, 1, 7, 18], dtype=torch.int32)
    for limit in (0, window):
        out = reference.attention(q, k, v, ends, 0.3, limit)
        for begin, end in zip(ends[:-1], ends[1:], strict=True):
            n = int(end - begin)
            visible = torch.ones(n, n, dtype=torch.bool).tril()
            if limit:
                visible &= ~torch.ones(n, n, dtype=torch.bool).tril(-limit)
            part = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
            expected = F.scaled_dot_product_attention(
                *part, attn_mask=visible, scale=0.3, enable_gqa=True
            )[0].transpose(0, 1)
            torch.testing.assert_close(out[begin:end], expected)


def test_losses():
    hidden, weight = random(6, 5), random(11, 5, seed=1)
    targets = torch.tensor([3, -100, 0, 10, -100, 7])
    logits = hidden @ weight.T
    torch.testing.assert_close(
        reference.linear_cross_entropy(hidden, weight, targets),
        F.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="sum"),
    )
    every = targets.clamp(min=0)
    torch.testing.assert_close(
        reference.linear_log_prob(hidden, weight, every, 0.7),
        (logits / 0.7).log_softmax(-1)[torch.arange(6), every],
    )


def test_narrow_types_are_rounded_once():
    x, weight = random(4, 32).bfloat16(), random(32, seed=1).bfloat16()
    exact = reference.rms_norm(x.double(), weight.double(), 1e-6)
    assert torch.equal(reference.rms_norm(x, weight, 1e-6), exact.bfloat16())
