"""csrc/kernels/cpu/packed_attention.cpp against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from gradients import FACTOR, gradients
from tolerance import assert_contraction
from torch import Tensor

from qwen_native import _C, ops, reference

FLOATS = [torch.float32, torch.bfloat16]
# lengths of the documents, heads, kv heads, head_dim, window
CASES = [
    ([40], 1, 1, 16, 0),
    ([0, 63, 0], 2, 1, 64, 0),
    ([64, 65], 4, 2, 40, 0),
    ([129, 1, 7], 3, 3, 96, 0),
    ([200], 2, 1, 33, 2),
    ([5, 190], 2, 2, 64, 63),
    ([193], 2, 1, 128, 70),
    ([70], 1, 1, 256, 0),
]


def ends_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs_of(
    rng: torch.Generator, lengths: Sequence[int], heads: int, kv_heads: int, dim: int, spread: float
) -> tuple[Tensor, ...]:
    tokens = sum(lengths)
    q = torch.randn((tokens, heads, dim), generator=rng) * spread
    k, v = torch.randn((2, tokens, kv_heads, dim), generator=rng)
    return q, k, v, torch.randn((tokens, heads, dim), generator=rng)


def eager(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float, window: int) -> Tensor:
    """As transformers computes it: scores and probabilities in the tensors' dtype."""
    group = q.shape[1] // k.shape[1]
    outputs = []
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        n = end - begin
        keys, values = (x[begin:end].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        if window:
            seen &= ~torch.ones(n, n, dtype=torch.bool).tril(-window)
        scores = q[begin:end].transpose(0, 1) @ keys.transpose(1, 2) * scale
        probs = scores.masked_fill(~seen, float("-inf")).float().softmax(-1).to(q.dtype)
        outputs.append((probs @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_results_and_gradients(isa, rng, case, dtype, spread):
    lengths, heads, kv_heads, dim, window = case
    ends, scale = ends_of(lengths), dim**-0.5
    q, k, v, dout = (x.to(dtype) for x in inputs_of(rng, *case[:4], spread))
    out, lse = ops.packed_attention(q, k, v, ends, scale, window)
    wide = [x.double() for x in (q, k, v)]
    ref = reference.attention(*wide, ends, scale, window)
    assert_contraction(out, ref, eager(q, k, v, ends, scale, window))

    grads = ops.packed_attention_bwd(dout, q, k, v, out, lse, ends, scale, window)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager(q, k, v, ends, scale, window)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, ends, scale, window)

    expected = gradients(exact, wide, dout.double())
    for grad, wide_grad, base in zip(
        grads, expected, gradients(plain, (q, k, v), dout), strict=True
    ):
        assert grad.dtype == dtype
        assert_contraction(grad, wide_grad, base, FACTOR)


@pytest.mark.parametrize("dtype", FLOATS)
def test_log_sum_exp(isa, rng, dtype):
    q, k, v, _ = (x.to(dtype) for x in inputs_of(rng, [100], 2, 1, 32, 3.0))
    lse = ops.packed_attention(q, k, v, ends_of([100]), 0.3)[1]
    scores = q.double().transpose(0, 1) @ k.double().permute(1, 2, 0) * 0.3
    scores = scores.masked_fill(~torch.ones(100, 100, dtype=torch.bool).tril(), float("-inf"))
    # Scores are sums of 32 float32 products below 2^6, the sum of exponentials has 100 terms.
    torch.testing.assert_close(lse.double() * math.log(2), scores.logsumexp(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_documents_and_threads_change_nothing(isa, rng, dtype):
    lengths = [77, 3, 130]
    q, k, v, dout = (x.to(dtype) for x in inputs_of(rng, lengths, 4, 2, 64, 1.0))

    def run(part: slice, ends: Tensor) -> list[Tensor]:
        rows = [x[part] for x in (q, k, v)]
        out, lse = ops.packed_attention(*rows, ends, 0.125)
        return [out, *ops.packed_attention_bwd(dout[part], *rows, out, lse, ends, 0.125)]

    together = run(slice(None), ends_of(lengths))
    alone = [run(slice(b, b + n), ends_of([n])) for b, n in zip([0, 77, 80], lengths, strict=True)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))
    threads = _C.op_threads()
    _C.set_op_threads(1 if threads > 1 else 2)
    again = run(slice(None), ends_of(lengths))
    _C.set_op_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))


def test_heads_of_a_fused_projection(isa, rng):
    """q, k and v as columns of one matrix."""
    rows = torch.randn((50, 8 * 32), generator=rng).bfloat16()
    q, k, v = (x.unflatten(1, (-1, 32)) for x in rows.split([128, 64, 64], 1))
    ends = ends_of([50])
    out, lse = ops.packed_attention(q, k, v, ends, 0.2)
    dense = [x.contiguous() for x in (q, k, v)]
    assert torch.equal(out, ops.packed_attention(*dense, ends, 0.2)[0])
    dout = torch.randn(out.shape, generator=rng).bfloat16()
    strided = ops.packed_attention_bwd(dout, q, k, v, out, lse, ends, 0.2)
    expected = ops.packed_attention_bwd(dout, *dense, out, lse, ends, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(strided, expected, strict=True))


def test_wrong_inputs_are_named():
    q, kv = torch.ones(4, 2, 16), torch.ones(4, 1, 16)
    ends = ends_of([4])
    with pytest.raises(ValueError, match=r"cu_seqlens goes from 0 to 3, expected 0 to the 4"):
        ops.packed_attention(q, kv, kv, ends_of([3]), 1.0)
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 2, expected at least the 5"):
        ops.packed_attention(q, kv, kv, torch.tensor([0, 5, 2, 4], dtype=torch.int32), 1.0)
    with pytest.raises(ValueError, match=r"q has 2 heads, expected a multiple of the 3 kv heads"):
        ops.packed_attention(q, torch.ones(4, 3, 16), torch.ones(4, 3, 16), ends, 1.0)
    with pytest.raises(ValueError, match=r"head_dim is 257, expected 1 to 256"):
        ops.packed_attention(torch.ones(4, 1, 257), *torch.ones(2, 4, 1, 257), ends, 1.0)
    with pytest.raises(ValueError, match=r"scale is 0, expected a positive number"):
        ops.packed_attention(q, kv, kv, ends, 0.0)
    out, lse = ops.packed_attention(q, kv, kv, ends, 1.0)
    with pytest.raises(ValueError, match=r"\[packed_attention_bwd\] lse is f32\[4, 2\], expected"):
        ops.packed_attention_bwd(q, q, kv, kv, out, lse.T.contiguous(), ends, 1.0)
