"""csrc/kernels/cpu/attention.cpp and kv_append.cpp against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tolerance import assert_contraction

from qwen_native import _C, ops

# heads, kv heads, head_dim: MHA and groups of 7, 4 and 3
SHAPES = [(2, 2, 64), (14, 2, 64), (4, 1, 128), (3, 1, 80), (6, 2, 96)]
# Every length with one shape, every shape with one length.
CASES = [(tokens, (7, 1, 64)) for tokens in (1, 15, 16, 17, 63, 64, 65, 200, 700)]
CASES += [(277, shape) for shape in SHAPES]
DTYPES = ["f32", "bf16", "int8"]


class Cache:
    """Sequences of one layer in pages whose order is shuffled and whose free slots are NaN."""

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        dtype: str,
        pages: int,
        page_tokens: int = 64,
        key_scale: torch.Tensor | None = None,
    ):
        words = ops.kv_page_bytes(page_tokens, kv_heads, head_dim, dtype) // 4
        pool = torch.full(
            (pages, words), -1, dtype=torch.int32
        )  # all bits set: NaN in f32 and bf16
        self.pages = ops.KvPages(pool, page_tokens, kv_heads, head_dim, dtype, key_scale)
        self.free = torch.randperm(pages, generator=torch.Generator().manual_seed(pages)).tolist()
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def append(self, batch: list[tuple[int, torch.Tensor, torch.Tensor]]) -> list[ops.SequenceSpan]:
        """Appends (sequence, k, v) in one call and returns the spans."""
        spans, begin = [], 0
        for sequence, k, _ in batch:
            table = self.tables.setdefault(sequence, [])
            self.lengths[sequence] = self.lengths.get(sequence, 0) + len(k)
            while len(table) * self.pages.page_tokens < self.lengths[sequence]:
                table.append(self.free.pop())
            spans.append(ops.SequenceSpan(begin, len(k), self.lengths[sequence], list(table)))
            begin += len(k)
        k = torch.cat([k for _, k, _ in batch])
        v = torch.cat([v for _, _, v in batch])
        ops.kv_append(self.pages, k, v, spans)
        return spans


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = _C.op_threads()
    _C.set_op_threads(count)
    try:
        yield
    finally:
        _C.set_op_threads(before)


def random_qkv(rng, tokens, shape, score=1.0):
    heads, kv_heads, head_dim = shape
    q = torch.randn((tokens, heads, head_dim), generator=rng) * score
    k = torch.randn((tokens, kv_heads, head_dim), generator=rng)
    v = torch.randn((tokens, kv_heads, head_dim), generator=rng)
    return q, k, v


def reference(q, k, v, window=0, query_scale=None):
    """Softmax attention of whole sequences in the dtype of its arguments."""
    tokens, heads, head_dim = q.shape
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5
    if query_scale is not None:
        scores = scores * query_scale.to(scores.dtype)[None, :, None]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probs, v)


def rounded_to_int8(x):
    """x with 8 bits and a scale for each token and head."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, torch.round(x / scale) * scale, 0)


def as_stored(x, dtype, factors=None):
    """What a cache of `dtype` holds of x, in float32."""
    if dtype != "int8":
        return x.to(torch.float32 if dtype == "f32" else torch.bfloat16).float()
    return rounded_to_int8(x) if factors is None else rounded_to_int8(x / factors) * factors


def check(out, q, k, v, dtype, key_scale=None, **options):
    """The truth sees the keys and values as they were stored."""
    k, v = as_stored(k, dtype, key_scale), as_stored(v, dtype)
    ref = reference(q.double(), k.double(), v.double(), **options)
    # The result is float32, but as accurate as its cache: measured in the cache's unit. An int8
    # cache is multiplied as bf16.
    unit = torch.float32 if dtype == "f32" else torch.bfloat16
    base = reference(q.to(unit), k.to(unit), v.to(unit), **options)
    assert torch.isfinite(out).all()
    assert_contraction(out.to(unit), ref, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, shape", CASES)
def test_prefill_matches_reference(isa, rng, tokens, shape, dtype):
    q, k, v = random_qkv(rng, tokens, shape)
    cache = Cache(shape[1], shape[2], dtype, pages=16)
    spans = cache.append([(0, k, v)])
    check(ops.attention(q, cache.pages, spans), q, k, v, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logn", [False, True])
@pytest.mark.parametrize("window", [0, 1, 31, 64, 300])
@pytest.mark.parametrize("score", [1e-3, 30.0])
def test_window_and_query_scale(isa, rng, score, window, logn, dtype):
    tokens, shape = 330, (3, 1, 64)
    q, k, v = random_qkv(rng, tokens, shape, score)
    factors = torch.linspace(1.0, 1.7, tokens) if logn else None
    cache = Cache(shape[1], shape[2], dtype, pages=16)
    spans = cache.append([(0, k, v)])
    out = ops.attention(q, cache.pages, spans, window=window, query_scale=factors)
    check(out, q, k, v, dtype, window=window, query_scale=factors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_tokens", [32, 96])
@pytest.mark.parametrize("head_dim", [16, 48, 256])
def test_other_page_and_head_sizes(isa, rng, head_dim, page_tokens, dtype):
    shape = (3, 1, head_dim)
    q, k, v = random_qkv(rng, 131, shape)
    cache = Cache(1, head_dim, dtype, pages=12, page_tokens=page_tokens)
    spans = cache.append([(0, k, v)])
    check(ops.attention(q, cache.pages, spans), q, k, v, dtype)


def run_in_chunks(qkv, shape, dtype, chunk, window=0, page_tokens=64):
    q, k, v = qkv
    cache = Cache(shape[1], shape[2], dtype, 20, page_tokens)
    outs = []
    for begin in range(0, len(q), chunk):
        rows = slice(begin, begin + chunk)
        spans = cache.append([(0, k[rows], v[rows])])
        outs.append(ops.attention(q[rows], cache.pages, spans, window=window))
    return torch.cat(outs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 300])
def test_chunks_do_not_change_a_bit(isa, rng, window, shape, dtype):
    tokens = 300 if isa == "scalar" else 600
    qkv = random_qkv(rng, tokens, shape, score=2.0)
    whole = run_in_chunks(qkv, shape, dtype, tokens, window)
    for chunk in (1, 17, 129):
        with threads(1 if chunk == 17 else 2):
            assert torch.equal(run_in_chunks(qkv, shape, dtype, chunk, window), whole)


@pytest.mark.parametrize("exponent, page_tokens", [(-130, 64), (-126, 32), (-70, 96), (60, 64)])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_single_rows_round_tiny_and_huge_numbers_as_prefill_does(
    isa, rng, dtype, exponent, page_tokens
):
    """A single row of a head has products of its own, which treat denormals as tiles do."""
    q, k, v = random_qkv(rng, 200, (2, 2, 48))
    qkv = q * 2.0 ** -(exponent // 2), k * 2.0 ** (exponent // 2), v * 2.0**exponent
    whole = run_in_chunks(qkv, (2, 2, 48), dtype, 200, page_tokens=page_tokens)
    assert whole.isfinite().all()
    assert torch.equal(run_in_chunks(qkv, (2, 2, 48), dtype, 1, page_tokens=page_tokens), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_and_threads_do_not_change_a_bit(isa, rng, shape, dtype):
    lengths, queries = [257, 1, 600, 64, 31], [1, 1, 1, 5, 31]
    data = [random_qkv(rng, length, shape) for length in lengths]

    def run(sequences):
        """Attends to the last rows of each sequence together, with all before in the cache."""
        cache = Cache(shape[1], shape[2], dtype, pages=30)
        for i in sequences:
            cut = lengths[i] - queries[i]
            if cut:
                cache.append([(i, data[i][1][:cut], data[i][2][:cut])])
        cuts = {i: lengths[i] - queries[i] for i in sequences}
        spans = cache.append([(i, data[i][1][cuts[i] :], data[i][2][cuts[i] :]) for i in sequences])
        q = torch.cat([data[i][0][cuts[i] :] for i in sequences])
        out = ops.attention(q, cache.pages, spans[::-1])
        return {
            i: out[s.query_begin :][: s.query_count] for i, s in zip(sequences, spans, strict=True)
        }

    with threads(2):
        batched = run([0, 1, 2, 3, 4])
    for count in (1, 3):
        with threads(count):
            for i in range(len(lengths)):
                assert torch.equal(run([i])[i], batched[i])
            shuffled = run([3, 0, 4, 2, 1])
        assert all(torch.equal(shuffled[i], batched[i]) for i in batched)
    for i, out in batched.items():
        ref = reference(*(x.double() for x in data[i]))[-queries[i] :]
        assert (out.double() - ref).abs().max() < (1e-5 if dtype == "f32" else 0.03)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_guards_and_uncovered_rows(isa, rng, dtype):
    """q, k and v are slices of one fused projection; out lies between guard values."""
    tokens, (heads, kv_heads, head_dim) = 70, (6, 2, 80)
    fused = torch.randn((tokens, heads + 2 * kv_heads, head_dim), generator=rng)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    cache = Cache(kv_heads, head_dim, dtype, pages=4)
    span = ops.SequenceSpan(2, 67, 67, [3, 1])
    ops.kv_append(cache.pages, k, v, [span])
    storage = torch.full((tokens + 2, heads + 1, head_dim + 16), 7.0)
    out = storage[1:-1, :heads, :head_dim]
    assert ops.attention(q, cache.pages, [span], out=out) is out
    check(out[2:69], q[2:69], k[2:69], v[2:69], dtype)
    out[2:69] = 7.0
    assert (storage == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_arrays_and_empty_spans(isa, rng, dtype):
    shape = (4, 2, 64)
    q, k, v = (x.numpy() for x in random_qkv(rng, 33, shape))
    page_bytes = ops.kv_page_bytes(64, 2, 64, dtype)
    pages = ops.KvPages(np.full((1, page_bytes // 4), -1, np.int32), 64, 2, 64, dtype)
    spans = [ops.SequenceSpan(0, 0, 0, []), ops.SequenceSpan(0, 33, 33, [0])]
    ops.kv_append(pages, k, v, spans)
    out = ops.attention(q, pages, spans)
    assert isinstance(out, np.ndarray)
    check(*(torch.from_numpy(x) for x in (out, q, k, v)), dtype)
    assert ops.attention(q[:0], pages, spans[:1]).shape == (0, 4, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(isa, rng, dtype):
    shape = (7, 1, 64)
    q, k, v = random_qkv(rng, 40, shape)
    q[5, 3] = float("nan")
    cache = Cache(1, 64, dtype, pages=1)
    spans = cache.append([(0, k, v)])
    bad = torch.isnan(ops.attention(q, cache.pages, spans)).any(-1)
    assert bad[5, 3] and bad.sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_key_reaches_the_rows_that_see_it(isa, rng, dtype):
    shape = (7, 1, 64)
    q, k, v = random_qkv(rng, 300, shape)
    k[200, 0, 5] = float("nan")
    cache = Cache(1, 64, dtype, pages=5)
    bad = torch.isnan(ops.attention(q, cache.pages, cache.append([(0, k, v)])))
    assert bad[200:].all() and not bad[:200].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [-(2.0**22), -20.0, 20.0, 2.0**22])
def test_scores_that_rise_or_fall_by_far(isa, rng, step, dtype):
    """Every 100 keys the scores change so much that all others lose their weight."""
    tokens, shape = 420, (3, 1, 64)
    q, k, v = torch.zeros(tokens, 3, 64), torch.zeros(tokens, 1, 64), random_qkv(rng, 420, shape)[2]
    q[..., 0] = 8.0
    k[..., 0] = step * (torch.arange(tokens) // 100)[:, None]
    cache = Cache(1, 64, dtype, pages=7)
    spans = cache.append([(0, k, v)])
    check(ops.attention(q, cache.pages, spans), q, k, v, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reused_page_forgets_its_owner(isa, rng, dtype):
    """A page that held NaN is given to another sequence."""
    shape = (2, 1, 64)
    q, k, v = random_qkv(rng, 50, shape)
    cache = Cache(1, 64, dtype, pages=1)
    poison = torch.full((64, 1, 64), float("nan"))
    ops.kv_append(cache.pages, poison, poison, [ops.SequenceSpan(0, 64, 64, [0])])
    spans = cache.append([(0, k, v)])
    check(ops.attention(q, cache.pages, spans), q, k, v, dtype)


@pytest.mark.parametrize("tokens", [1, 33, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_key_scale_saves_the_other_channels(isa, rng, shape, tokens):
    """One channel of the keys is a hundred times as large as the others, as Qwen2's biases make."""
    q, k, v = random_qkv(rng, tokens, shape)
    k[..., 3] += 100.0
    key_scale = torch.ones(shape[1], shape[2])
    key_scale[:, 3] = 50.0
    errors = []
    for factors in (None, key_scale):
        cache = Cache(shape[1], shape[2], "int8", pages=5, key_scale=factors)
        out = ops.attention(q, cache.pages, cache.append([(0, k, v)]))
        check(out, q, k, v, "int8", key_scale=factors)
        exact = reference(q.double(), k.double(), as_stored(v, "int8").double())
        errors.append((out - exact).square().mean().item())
    assert tokens == 1 or errors[1] < errors[0] / 4


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("heads", [1, 7, 20])
def test_int8_codes_are_multiplied_exactly(isa, heads, slot):
    """Every code in both places of its pair, by one row, by one tile of rows and by two. The other
    value is all zeros and has no scale, but its weight.
    """
    v = torch.zeros(2, 1, 256)
    v[slot, 0, :255] = torch.arange(-127, 128)
    q, k = torch.ones(1, heads, 256), torch.zeros(2, 1, 256)
    cache = Cache(1, 256, "int8", pages=1)
    cache.append([(0, k, v)])
    out = ops.attention(q, cache.pages, [ops.SequenceSpan(0, 1, 2, cache.tables[0])])
    torch.testing.assert_close(out[0], v[slot].expand(heads, 256) / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("values", [0.0, 3.0, 1e-38, 1e30])
def test_int8_of_constant_and_extreme_rows(isa, values):
    """All elements alike: the code is 127, or nothing where the scale would be too small."""
    q, k = torch.ones(5, 2, 32), torch.zeros(5, 1, 32)
    v = torch.full((5, 1, 32), values)
    cache = Cache(1, 32, "int8", pages=1)
    out = ops.attention(q, cache.pages, cache.append([(0, k, v)]))
    assert torch.allclose(out, torch.full_like(out, values), rtol=2**-7, atol=1e-37)
    cache = Cache(1, 32, "int8", pages=1)
    out = ops.attention(q, cache.pages, cache.append([(0, v, q[:, :1])]), scale=1e-30)
    assert torch.allclose(out, torch.ones_like(out), rtol=2**-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_keeps_what_is_not_finite(isa, rng, value):
    q, k, v = random_qkv(rng, 40, (2, 1, 64))
    v[20, 0, 7] = value
    cache = Cache(1, 64, "int8", pages=1)
    out = ops.attention(q, cache.pages, cache.append([(0, k, v)]))
    assert torch.isnan(out[20:]).all()


def test_errors_name_the_value(rng):
    shape = (4, 2, 64)
    q, k, v = random_qkv(rng, 3, shape)
    cache = Cache(2, 64, "f32", pages=1)
    spans = cache.append([(0, k, v)])
    with pytest.raises(ValueError, match="page_tokens is 40, expected a positive multiple of 32"):
        ops.kv_page_bytes(40, 2, 64, "f32")
    with pytest.raises(ValueError, match="head_dim is 72, expected a multiple of 16"):
        ops.kv_page_bytes(64, 2, 72, "f32")
    with pytest.raises(ValueError, match="kv_dtype is 'f16', expected f32, bf16 or int8"):
        ops.kv_page_bytes(64, 2, 64, "f16")
    with pytest.raises(ValueError, match=r"key_scale is f32\[2, 32\], expected dense f32\[2, 64\]"):
        ops.attention(q, cache.pages._replace(key_scale=torch.ones(2, 32)), spans)
    with pytest.raises(ValueError, match="key_scale is given for a cache of f32, expected int8"):
        ops.attention(q, cache.pages._replace(key_scale=torch.ones(2, 64)), spans)
    with pytest.raises(ValueError, match="q has 3 heads, expected a multiple of the 2 kv heads"):
        ops.attention(q[:, :3], cache.pages, spans)
    with pytest.raises(ValueError, match=r"k is f32\[3, 1, 64\], expected 2 heads"):
        ops.kv_append(cache.pages, k[:, :1], v[:, :1], spans)
    with pytest.raises(ValueError, match="scale is 0, expected a positive number"):
        ops.attention(q, cache.pages, spans, scale=0.0)
    with pytest.raises(ValueError, match=r"query_scale\[1\] is -1, expected a positive number"):
        ops.attention(q, cache.pages, spans, query_scale=torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="window is -1, expected at least 0"):
        ops.attention(q, cache.pages, spans, window=-1)
    with pytest.raises(ValueError, match="span 0 has rows 1 to 4, expected rows within 0 to 3"):
        ops.attention(q, cache.pages, [ops.SequenceSpan(1, 3, 3, [0])])
    with pytest.raises(ValueError, match="span 0 has kv_len 2, expected at least its 3 rows"):
        ops.attention(q, cache.pages, [ops.SequenceSpan(0, 3, 2, [0])])
    with pytest.raises(ValueError, match="page table has 1 pages, expected 2 for 65 tokens"):
        ops.attention(q, cache.pages, [ops.SequenceSpan(0, 3, 65, [0])])
    with pytest.raises(ValueError, match="page number is 1, expected 0 to 0"):
        ops.attention(q, cache.pages, [ops.SequenceSpan(0, 3, 3, [1])])
