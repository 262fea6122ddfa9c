"""csrc/kernels/cpu/gemm_float.cpp through ops.linear against float64.

At the levels avx512_bf16 and amx, bf16 weights see x rounded to bf16. That rounding is part of the
op there: the float64 reference gets the rounded x, so that the sums are held to the same limits as
everywhere, and a test of its own compares the whole with torch's bf16 matmul, which rounds x the
same way.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap

import numpy as np
import pytest
import torch
from tolerance import assert_contraction

from qwen_native import _C, ops

TOKENS = [0, 1, 2, 5, 16, 17, 33, 64]
COLS = [1, 31, 33, 64, 896, 4864, 11008]
ROWS = [1, 15, 16, 17, 33, 151]
DTYPES = [torch.float32, torch.bfloat16]
ROUNDS_X = ("avx512_bf16", "amx")  # beside bf16 weights


def make(rng, tokens, rows, cols, dtype, scale=1.0):
    x = torch.randn((tokens, cols), generator=rng) * scale
    weight = torch.randn((rows, cols), generator=rng).to(dtype)
    bias = torch.randn(rows, generator=rng) * scale
    return x, weight, bias


def seen(x: torch.Tensor, weight: torch.Tensor, isa: str) -> torch.Tensor:
    """x as the kernel multiplies it."""
    return x.bfloat16().float() if isa in ROUNDS_X and weight.dtype == torch.bfloat16 else x


def expected(x, weight, bias, isa, before=None):
    """The float64 result, and torch's float32 product of the same numbers."""
    x = seen(x, weight, isa)
    ref, base = x.double() @ weight.double().T, x @ weight.float().T
    if bias is not None:
        ref, base = ref + bias.double(), base + bias
    if before is not None:
        ref, base = ref + before.double(), base + before
    return ref, base


def check(out, x, weight, bias, isa, before=None):
    assert_contraction(out, *expected(x, weight, bias, isa, before))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", COLS)
def test_sizes(isa, rng, cols, dtype):
    """All sizes with these columns are judged together: torch's own error on one or two outputs is
    a matter of luck."""
    results = []
    for tokens, rows in itertools.product(TOKENS, ROWS):
        if tokens * rows * cols > 6e6:
            continue
        x, weight, bias = make(rng, tokens, rows, cols, dtype)
        out = ops.linear(x, weight, bias)
        assert out.shape == (tokens, rows)
        results.append([part.flatten() for part in (out, *expected(x, weight, bias, isa))])
    assert_contraction(*(torch.cat(parts) for parts in zip(*results, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,rows,cols", [(600, 70, 100), (530, 161, 1300), (97, 300, 2500)])
def test_cache_blocks(isa, rng, tokens, rows, cols, dtype):
    """More tokens, rows and columns than one block of each kind."""
    x, weight, bias = make(rng, tokens, rows, cols, dtype)
    check(ops.linear(x, weight, bias), x, weight, bias, isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_epilogues_and_scales(isa, rng, scale, add, with_bias, dtype):
    results = []
    for tokens in [1, 17, 65]:
        x, weight, bias = make(rng, tokens, 47, 200, dtype, scale)
        bias = bias if with_bias else None
        before = torch.randn((tokens, 47), generator=rng) * scale
        out = before.clone() if add else torch.full_like(before, float("nan"))
        assert ops.linear(x, weight, bias, out=out, add=add) is out
        results.append((out, *expected(x, weight, bias, isa, before if add else None)))
    assert_contraction(*(torch.cat(parts) for parts in zip(*results, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_strides_segments_and_guards(isa, rng, tokens, dtype):
    """Padded rows everywhere, three weights of both formats; memory around every output row stays
    as it was."""
    cols = 75
    x = torch.randn((tokens + 1, 100), generator=rng)[1:, 7 : 7 + cols]
    shapes = [(50, dtype), (3, torch.float32), (33, torch.bfloat16)]
    weights = [
        torch.randn((rows, 90), generator=rng).to(kind)[:, 5 : 5 + cols] for rows, kind in shapes
    ]
    biases = [torch.randn(50, generator=rng), None, torch.randn(33, generator=rng)]
    storage = torch.full((tokens + 2, 120), 77.0)
    out = storage[1:-1, 11 : 11 + 86]
    ops.linear(x, weights, biases, out=out)
    results = []
    for weight, bias, part in zip(weights, biases, out.split([50, 3, 33], dim=1), strict=True):
        results.append((part, *expected(x, weight, bias, isa)))
    assert_contraction(*(torch.cat(parts, dim=1) for parts in zip(*results, strict=True)))
    out.fill_(77.0)
    assert (storage == 77.0).all()


@pytest.mark.parametrize("cols", [31, 200])
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_weight_at_odd_addresses(isa, rng, tokens, cols):
    """A tensor of a mapped file may start at any byte; the last row ends where the file ends."""
    x, weight, _ = make(rng, tokens, 35, cols, torch.float32)
    raw = bytearray(3 + weight.numel() * 4)
    raw[3:] = weight.numpy().tobytes()
    unaligned = np.frombuffer(raw, dtype=np.float32, offset=3).reshape(weight.shape)
    out = ops.linear(x.numpy(), unaligned)
    assert isinstance(out, np.ndarray)
    assert np.array_equal(out, ops.linear(x, weight).numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_past_the_weight(isa, rng, dtype):
    """The weight ends where an inaccessible page begins, like the last tensor of a mapped file."""
    page, size = mmap.PAGESIZE, 64 * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    guard = ctypes.c_void_p(address + size)
    assert libc.mprotect(guard, ctypes.c_size_t(page), 0) == 0
    for rows, cols in [(1, 1), (32, 64), (33, 31), (35, 33), (64, 75), (47, 1300)]:
        weight = torch.randn((rows, cols), generator=rng).to(dtype)
        data = torch.frombuffer(memory, dtype=dtype, count=size // dtype.itemsize)
        at_end = data[data.numel() - weight.numel() :].view(rows, cols)
        at_end.copy_(weight)
        for tokens in [1, 3, 20, 70]:
            x = torch.randn((tokens, cols), generator=rng)
            assert torch.equal(ops.linear(x, at_end), ops.linear(x, weight)), (rows, cols, tokens)
    assert libc.mprotect(guard, ctypes.c_size_t(page), mmap.PROT_READ) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,cols", [(151, 896), (70, 1300), (33, 75)])
def test_bits_do_not_depend_on_batch_or_threads(isa, rng, rows, cols, dtype):
    x, weight, bias = make(rng, 541, rows, cols, dtype)
    threads = _C.op_threads()
    try:
        _C.set_op_threads(1)
        whole = ops.linear(x, weight, bias)
        _C.set_op_threads(3)
        assert torch.equal(ops.linear(x, weight, bias), whole)
        for tokens in [1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 48, 64, 97, 513]:
            first = 541 - tokens
            assert torch.equal(ops.linear(x[first:], weight, bias), whole[first:]), tokens
    finally:
        _C.set_op_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 20, 50])
def test_nan_stays_in_its_row_and_column(isa, rng, tokens, dtype):
    x, weight, _ = make(rng, tokens, 45, 70, dtype)
    x[tokens // 2, 69] = float("nan")
    weight[44, 3] = float("inf")
    out = ops.linear(x, weight)
    assert torch.isnan(out[tokens // 2]).all()
    others = [t for t in range(tokens) if t != tokens // 2]
    assert torch.isinf(out[others, 44]).all()
    assert torch.isfinite(out[others, :44]).all()


def test_bf16_matches_torch_bf16_matmul(isa, rng):
    """With the rounding of x included, the error stays within what torch's bf16 matmul makes."""
    x, weight, _ = make(rng, 40, 64, 896, torch.bfloat16)
    base = torch.nn.functional.linear(x.bfloat16(), weight).float()
    assert_contraction(ops.linear(x, weight), x.double() @ weight.double().T, base)


def test_no_tokens_and_no_rows(isa):
    assert ops.linear(torch.ones(0, 8), torch.ones(5, 8)).shape == (0, 5)
    assert ops.linear(torch.ones(3, 8), torch.ones(0, 8)).shape == (3, 0)
    empty_sum = ops.linear(torch.ones(2, 0), torch.ones(3, 0), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(empty_sum, torch.tensor([[1.0, 2.0, 3.0]] * 2))


def test_mistakes_are_named():
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"weight 0 is \[3, 5\], expected x's 4 columns"):
        ops.linear(x, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"\[linear\] bias is f32\[2\], expected f32\[3\]"):
        ops.linear(x, weight, torch.ones(2))
    with pytest.raises(ValueError, match=r"writes columns 0 to 3, expected at most 2"):
        ops.linear(x, weight, out=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"out is f32\[1, 3\], expected f32\[2, rows\]"):
        ops.linear(x, weight, out=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"\[linear\] x is bf16\[2, 4\], expected f32"):
        ops.linear(x.bfloat16(), weight)
    with pytest.raises(ValueError, match=r"x has stride 2 along its last axis, expected 1"):
        ops.linear(torch.ones(2, 8)[:, ::2], weight)
    with pytest.raises(
        ValueError, match=r"\[weight\] data is f32\[3, 4\], expected .* with a dense last axis"
    ):
        ops.linear(x, torch.ones(4, 3).T)
    with pytest.raises(ValueError, match=r"\[linear\] out is missing"):
        ops.linear(x, weight, add=True)
    with pytest.raises(ValueError, match=r"write the same columns"):
        segments = [_C.LinearSegment(weight, None, 0), _C.LinearSegment(weight, None, 2)]
        _C.linear(torch.ones(2, 9), x, segments, False, False)


def test_leaves_the_tiles_of_other_libraries_alone(isa, rng):
    """torch's own AMX kernels run on the same thread before and after ours."""
    a = torch.randn((64, 512), generator=rng).bfloat16()
    b = torch.randn((512, 64), generator=rng).bfloat16()
    before = a @ b
    weight = torch.randn((33, 65), generator=rng).bfloat16()
    ops.linear(torch.randn((5, 65), generator=rng), weight)
    assert torch.equal(a @ b, before)
