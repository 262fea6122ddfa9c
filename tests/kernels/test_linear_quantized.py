"""gemm_int8, gemm_int8_grouped, gemm_int4 and gemm_folded through ops.linear against float64.

The kernels quantise x themselves. The exact ones are compared with the float64 product of the
dequantised weights and of x quantised here, in numpy, by the rule of quantize_activations.cpp: what
is left is float32 summation, held to the limits of every other matrix product. The error that
quantising x makes is bounded apart, against the unquantised x.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import quant_reference
import torch
from quantized_inputs import Weight, block_cols, fold_step, quantized
from tolerance import assert_contraction

from qwen_native import _C, ops

FORMATS = quant_reference.FORMATS
TOKENS = [1, 2, 3, 5, 8, 15, 16, 17, 33]
ROWS = [1, 16, 31, 33, 70]
COLS = [1, 31, 33, 64, 200, 896]
# Levels at which many tokens with 4-bit weights take the folded kernel.
FOLDING = ("avx2", "avx512", "avx512_bf16", "amx")


def make(rng, fmt, tokens, rows, cols, scale=1.0):
    x = torch.randn((tokens, cols), generator=rng) * scale
    bias = torch.randn(rows, generator=rng) * scale
    return x, Weight(rng, fmt, rows, cols), bias


def linear(x, weight, bias=None, *, out=None, add=False, invariant=True):
    return ops.linear(x, weight.packed, bias, out=out, add=add, invariant=invariant)


def expected(x, weight, bias=None, before=None):
    """The float64 result on quantised x, and torch's float32 product of the same numbers."""
    x, _ = quantized(x, block_cols(weight.packed.format, x.shape[1]))
    ref, base = x @ weight.values.T, x.float() @ weight.values.float().T
    if bias is not None:
        ref, base = ref + bias.double(), base + bias
    if before is not None:
        ref, base = ref + before.double(), base + before
    return ref, base


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("cols", COLS)
def test_sizes(isa, rng, cols, fmt):
    """Judged together: torch's own error on one or two outputs is a matter of luck."""
    results = []
    for tokens, rows in itertools.product(TOKENS, ROWS):
        x, weight, bias = make(rng, fmt, tokens, rows, cols)
        out = linear(x, weight, bias)
        assert out.shape == (tokens, rows)
        results.append([part.flatten() for part in (out, *expected(x, weight, bias))])
    assert_contraction(*(torch.cat(parts) for parts in zip(*results, strict=True)))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tokens,rows,cols", [(1, 300, 4864), (6, 170, 2048), (400, 70, 4864)])
def test_model_sizes(isa, rng, tokens, rows, cols, fmt):
    """Several streams of panels with a remainder, more x than one pass holds, several blocks."""
    x, weight, bias = make(rng, fmt, tokens if isa != "scalar" else min(tokens, 70), rows, cols)
    assert_contraction(linear(x, weight, bias), *expected(x, weight, bias))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_epilogues_and_scales(isa, rng, scale, add, with_bias, fmt):
    results = []
    for tokens in [1, 6, 17, 65]:
        x, weight, bias = make(rng, fmt, tokens, 47, 200, scale)
        bias = bias if with_bias else None
        before = torch.randn((tokens, 47), generator=rng) * scale
        out = before.clone() if add else torch.full_like(before, float("nan"))
        assert linear(x, weight, bias, out=out, add=add) is out
        results.append((out, *expected(x, weight, bias, before if add else None)))
    assert_contraction(*(torch.cat(parts) for parts in zip(*results, strict=True)))


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("invariant", [False, True])
def test_strides_segments_and_guards(isa, rng, tokens, invariant):
    """Strided rows, one weight of every format and a float one; the memory around out stays."""
    cols = 75
    x = torch.randn((tokens + 1, 100), generator=rng)[1:, 7 : 7 + cols]
    sizes = [50, 3, 33, 40]
    weights = [Weight(rng, fmt, rows, cols) for fmt, rows in zip(FORMATS, sizes, strict=True)]
    plain = torch.randn((20, cols), generator=rng)
    biases = [torch.randn(50, generator=rng), None, torch.randn(33, generator=rng), None, None]
    storage = torch.full((tokens + 2, 180), 77.0)
    out = storage[1:-1, 11 : 11 + sum(sizes) + 20]
    everything = [*(w.packed for w in weights), plain]
    ops.linear(x, everything, biases, out=out, invariant=invariant)
    alone = [
        ops.linear(x, w, b, invariant=invariant) for w, b in zip(everything, biases, strict=True)
    ]
    assert torch.equal(out, torch.cat(alone, dim=1))
    if invariant:
        parts = out[:, : sum(sizes)].split(sizes, dim=1)
        for part, weight, bias in zip(parts, weights, biases[:4], strict=True):
            assert_contraction(part, *expected(x, weight, bias), factor=3.0)
    out.fill_(77.0)
    assert (storage == 77.0).all()


@pytest.mark.usefixtures("memory_streams")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows,cols", [(170, 896), (33, 75), (215, 75)])
def test_bits_do_not_depend_on_batch_or_threads(isa, rng, rows, cols, fmt):
    x, weight, bias = make(rng, fmt, 70, rows, cols)
    threads = _C.op_threads()
    try:
        _C.set_op_threads(1)
        whole = linear(x, weight, bias)
        for count in (1, 2):
            _C.set_op_threads(count)
            for tokens in [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 64, 70]:
                first = 70 - tokens
                part = linear(x[first:], weight, bias)
                assert torch.equal(part, whole[first:]), (count, tokens)
                if fmt.startswith("int8") or isa not in FOLDING or tokens < _C.folded_tokens():
                    fast = linear(x[first:], weight, bias, invariant=False)
                    assert torch.equal(fast, part), (count, tokens)
    finally:
        _C.set_op_threads(threads)


@pytest.mark.parametrize("fmt", FORMATS)
def test_panels_side_by_side_change_nothing(isa, rng, fmt):
    """Two or four, with runs of panels that leave a rest, and on both sides of where int8 and 4-bit
    weights change their kernels: exact 4-bit batches and int8 ones of any size have the same
    bits."""
    before = _C.memory_streams()
    results = {}
    try:
        for streams in (2, 4):
            _C.set_memory_streams(streams)
            generator = torch.Generator().manual_seed(5)
            x, weight, bias = make(generator, fmt, 97, 11 * 32 + 5, 150)
            counts = (*range(1, 10), 13, 23, 24, 31, 32, 33, 95, 96, 97)
            results[streams] = [linear(x[:n], weight, bias) for n in counts]
            for n, result in zip(counts, results[streams], strict=True):
                exact = fmt.startswith("int8") or isa not in FOLDING or n < _C.folded_tokens()
                fast = linear(x[:n], weight, bias, invariant=False)
                assert torch.equal(fast, result) == exact, (streams, n)
            for n, result in zip(counts, results[streams], strict=True):
                assert_contraction(result, *expected(x[:n], weight, bias))
    finally:
        _C.set_memory_streams(before)
    assert before in (2, 4)
    assert all(torch.equal(a, b) for a, b in zip(results[2], results[4], strict=True))
    with pytest.raises(ValueError, match=r"count is 3, expected 2 or 4"):
        _C.set_memory_streams(3)


@pytest.mark.usefixtures("memory_streams")
@pytest.mark.parametrize(
    "rows,cols",
    # 16 panels, of which gemm_folded keeps 7; more than gemm_int8 keeps of 70 tokens
    [(500, 4100), (70, 18944)],
)
def test_int8_bits_with_more_than_stays_in_l2(isa, rng, rows, cols):
    """Several passes over the tokens and over the columns; single tokens are walked otherwise."""
    x, weight, bias = make(rng, "int8", 70, rows, cols)
    x = x[: 10 if isa == "scalar" else 70]
    threads = _C.op_threads()
    try:
        for count in (1, 3):
            _C.set_op_threads(count)
            whole = linear(x, weight, bias)
            for token in (0, 5, len(x) - 1):
                assert torch.equal(linear(x[token : token + 1], weight, bias)[0], whole[token])
    finally:
        _C.set_op_threads(threads)


@pytest.mark.parametrize("fmt", FORMATS)
def test_levels_with_fused_multiply_add_agree(rng, fmt):
    """The int32 sums are exact and the order of float operations is the same at every level."""
    x, weight, bias = make(rng, fmt, 37, 70, 200)
    levels = [level for level in ops.available_isas() if level != "scalar"]
    outs = []
    for level in levels:
        ops.set_isa(level)
        outs.append(linear(x, weight, bias))
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.usefixtures("folded_from_8")
@pytest.mark.parametrize("fmt", ["int8", "int4_symmetric", "int4"])
@pytest.mark.parametrize("tokens,rows,cols", [(8, 33, 75), (33, 70, 200), (70, 47, 2100)])
def test_folded_tiles_and_vnni_agree(rng, tokens, rows, cols, fmt):
    """Both round weights to the same int8 codes, and sums of integers are exact."""
    if "amx" not in ops.available_isas():
        pytest.skip("this host has no AMX")
    x, weight, bias = make(rng, fmt, tokens, rows, cols)
    outs = []
    for level in ("avx512", "amx"):
        ops.set_isa(level)
        outs.append(linear(x, weight, bias, invariant=False))
    assert torch.equal(*outs)


def outlier_input(rng, tokens, cols):
    """Rows with a few elements a hundred times larger than the rest, and a row of zeros."""
    x = torch.randn((tokens, cols), generator=rng)
    x[:, 5] *= 100
    x[0, cols - 1] = 300.0
    x[tokens // 2] = 0
    return x


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tokens", [2, 20])
def test_error_of_quantised_activations_is_bounded(isa, rng, tokens, fmt):
    """|error| <= sum |w| * max |x of the group| / 254, half a step of the code for each product."""
    x = outlier_input(rng, tokens, 300)
    weight = Weight(rng, fmt, 40, 300)
    _, scale = quantized(x, block_cols(fmt, 300))
    error = (linear(x, weight).double() - x.double() @ weight.values.T).abs()
    half_steps = scale / 2 @ weight.values.abs().T
    rounding = 300 * 2.0**-23 * (x.double().abs() @ weight.values.abs().T)  # float32 sums
    assert (error <= half_steps + rounding).all()
    assert (linear(x, weight)[tokens // 2] == 0).all()


@pytest.mark.usefixtures("folded_from_8")
@pytest.mark.parametrize("fmt", ["int4_symmetric", "int4"])
@pytest.mark.parametrize("tokens,rows,cols", [(8, 33, 64), (17, 70, 200), (70, 40, 2100)])
def test_folded_error_is_bounded(isa, rng, tokens, rows, cols, fmt):
    """Where int4 takes the folded kernel, rounding twice costs what the steps predict.

    A folded weight is off by at most half a step, and by what the fraction bits of its scale and
    min leave: with int4_symmetric 15/256 + 1/256 of a step for seven bits; with int4 8/32, for four
    bits and codes up to 8 from the middle, and some 256ths for eight bits. x is off by half a step
    of its block of 1024. Independent uniform errors have a variance of step^2 / 12.
    """
    x, weight = outlier_input(rng, tokens, cols), Weight(rng, fmt, rows, cols)
    out = linear(x, weight, invariant=False)
    error = out.double() - x.double() @ weight.values.T
    _, step = quantized(x, 1024 if isa in FOLDING else 32)
    w, wide = weight.values.abs(), x.double().abs()
    of_step = 0.5 + (16 / 256 if fmt == "int4_symmetric" else 8 / 32 + 4 / 256)
    worst = (wide + step / 2) @ torch.ones_like(w).T * weight.fold_step * of_step
    worst += step / 2 @ w.T + cols * 2.0**-23 * (wide @ w.T)
    assert (error.abs() <= worst).all()
    variance = wide.square().sum(1, keepdim=True) * weight.fold_step.square() / 12
    variance = variance + step.square() / 12 @ w.square().T
    assert error.square().mean().sqrt() <= 1.2 * variance.mean().sqrt()


@pytest.mark.usefixtures("folded_from_8")
@pytest.mark.parametrize("tokens", [8, 40])
@pytest.mark.parametrize("code,scale,least", [(7, 250, 233), (15, 130, 255), (0, 250, 20)])
def test_folded_codes_that_do_not_occur(isa, rng, tokens, code, scale, least):
    """A group of two codes whose others stand for weights far beyond the largest of the row."""
    rows, cols = 35, 96
    parts = quant_reference.quantize("int4", torch.randn((rows, cols), generator=rng).numpy())
    parts.scale //= 16
    parts.min //= 16
    parts.scale[:rows, 1], parts.min[:rows, 1] = scale, least
    parts.codes[:, 1] = code
    parts.codes[:, 1, ::3] = code ^ 1
    values = quant_reference.dequantize("int4", parts)
    parts.fold_scale = (np.abs(values).max(-1) / 127).astype(np.float32)
    packed = ops.PackedWeight(quant_reference.pack("int4", parts), "int4", rows, cols)
    w, x = torch.from_numpy(values[:rows, :cols].copy()), torch.randn((tokens, cols), generator=rng)
    out = ops.linear(x, packed, invariant=False)
    wide, step = quantized(x, 1024 if isa in FOLDING else 32)
    of_weights = torch.from_numpy(fold_step("int4", parts)[:rows]) * (0.75 + 4 / 256)
    worst = (wide.abs() + step / 2) @ of_weights.expand(cols, rows) + step / 2 @ w.abs().T
    assert ((out.double() - x.double() @ w.T).abs() <= worst + 1e-5 * worst.max()).all()


@pytest.mark.usefixtures("folded_from_8")
@pytest.mark.parametrize("fmt", ["int4_symmetric", "int4"])
def test_folded_epilogues(isa, rng, fmt):
    for tokens in (8, 31, 70):
        x, weight, bias = make(rng, fmt, tokens, 75, 1300)
        before = torch.randn((tokens, 75), generator=rng)
        plain = linear(x, weight, invariant=False)
        with_bias = linear(x, weight, bias, invariant=False)
        added = linear(x, weight, bias, out=before.clone(), add=True, invariant=False)
        # A fused multiply-add may round the bias in, so the sums agree to float32 rounding only.
        slack = 4 * 2.0**-24 * (plain.abs() + bias.abs() + before.abs())
        assert ((with_bias - (plain + bias)).abs() <= slack).all()
        assert ((added - (before + with_bias)).abs() <= slack).all()


@pytest.mark.usefixtures("folded_from_8")
@pytest.mark.parametrize("fmt", ["int4_symmetric", "int4"])
def test_folded_rows_do_not_depend_on_each_other(isa, rng, fmt):
    x, weight, bias = make(rng, fmt, 300, 170, 1100)
    whole = linear(x, weight, bias, invariant=False)
    for tokens in (8, 16, 33, 257):
        part = linear(x[300 - tokens :], weight, bias, invariant=False)
        assert torch.equal(part, whole[300 - tokens :]), tokens


@pytest.mark.usefixtures("memory_streams")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 20, 50])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("invariant", [False, True])
def test_nan_and_infinity_stay_in_their_row(isa, rng, tokens, value, invariant, fmt):
    x, weight, _ = make(rng, fmt, tokens, 45, 70)
    x[tokens // 2, 69] = value
    out = linear(x, weight, invariant=invariant)
    assert torch.isnan(out[tokens // 2]).all()
    others = [t for t in range(tokens) if t != tokens // 2]
    assert torch.isfinite(out[others]).all()


@pytest.mark.usefixtures("memory_streams")
@pytest.mark.parametrize("fmt", FORMATS)
def test_extreme_magnitudes(isa, rng, fmt):
    """Neither the smallest nor the largest numbers of float32 overflow on the way."""
    x, weight, _ = make(rng, fmt, 20, 33, 64)
    for scale in (1e-44, 1e-37, 1e-30, 1e30):
        scaled = x * scale
        for invariant in (False, True):
            out = linear(scaled, weight, invariant=invariant)
            ref = scaled.double() @ weight.values.T
            limit = 0.05 * ref.abs().max() if scale >= 1e-30 else 1e-34
            assert ((out.double() - ref).abs() <= limit).all()


@pytest.mark.usefixtures("memory_streams")
@pytest.mark.parametrize("fmt", FORMATS)
def test_zero_weights_and_no_tokens(isa, rng, fmt):
    weight = Weight(rng, fmt, 35, 64, scale=0.0)
    bias = torch.randn(35, generator=rng)
    for tokens in (1, 20):
        out = linear(torch.randn((tokens, 64), generator=rng), weight, bias, invariant=False)
        assert torch.equal(out, bias.expand(tokens, -1))
    assert linear(torch.ones(0, 64), weight).shape == (0, 35)
