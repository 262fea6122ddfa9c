"""Every differentiable op of the model in plain torch: what the kernels are checked with.

Any float dtype on any device, differentiable by torch's autograd. Types below float32 are computed
in float32 and rounded once, at the end; float64 stays float64. A batch is one token axis of
concatenated documents: `cu_seqlens` [documents + 1], integers, says where each begins and ends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale to unit root mean square: x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).

    Args:
        x: [..., cols]; the mean is over the last dimension.
        weight: [cols].
        eps: added to the mean square.

    Returns:
        Like x.
    """
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * _wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s) for s = residual + x, both like x: [tokens, cols]."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + rope_dim / 2) of each head by their angles (arXiv 2104.09864).

    Args:
        x: [tokens, heads, head_dim]; dimensions beyond rope_dim pass through.
        cos: [tokens, rope_dim / 2], float32.
        sin: like cos.

    Returns:
        Like x.
    """
    half = cos.shape[-1]
    wide = _wide(x)
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all [tokens, inter] (arXiv 2002.05202)."""
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: x [..., cols], weight [rows, cols], bias [rows] or None."""
    return F.linear(x, weight, bias)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int = 0
) -> Tensor:
    """Causal attention within each document: softmax(scale q k^T) v.

    Args:
        q: [tokens, num_heads, head_dim].
        k: [tokens, num_kv_heads, head_dim]; query head h reads head h * num_kv_heads / num_heads.
        v: like k.
        cu_seqlens: [documents + 1]; document d has the tokens cu_seqlens[d] to cu_seqlens[d + 1].
        scale: factor of the scores.
        window: how many tokens a query sees, itself included; 0 for all before it.

    Returns:
        Like q.
    """
    group = q.shape[1] // k.shape[1]
    outputs = []
    ends = cu_seqlens.tolist()
    for begin, end in zip(ends, ends[1:], strict=False):
        # [heads, length, head_dim]
        queries = _wide(q[begin:end]).transpose(0, 1)
        keys = _wide(k[begin:end]).transpose(0, 1).repeat_interleave(group, 0)
        values = _wide(v[begin:end]).transpose(0, 1).repeat_interleave(group, 0)
        distance = torch.arange(end - begin, device=q.device)
        distance = distance[:, None] - distance
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """Sum of -log softmax(hidden weight^T)[target] over the tokens that count.

    Args:
        hidden: [tokens, hidden].
        weight: [vocab, hidden].
        targets: [tokens], int64; `ignore_index` where a token does not count.
        ignore_index: see targets.

    Returns:
        A scalar, float32 (float64 for float64 input). The caller divides by the number of tokens.
    """
    logits = _wide(hidden) @ _wide(weight).T
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


def linear_log_prob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """log softmax(hidden weight^T / temperature)[target] of every token.

    Args:
        hidden: [tokens, hidden].
        weight: [vocab, hidden].
        targets: [tokens], int64.
        temperature: divides the logits.

    Returns:
        [tokens], float32 (float64 for float64 input).
    """
    logits = _wide(hidden) @ _wide(weight).T / temperature
    return -F.cross_entropy(logits, targets, reduction="none")
