"""ops.mlp against float64: the exact arithmetic, and gated_gemm_folded."""

from __future__ import annotations

import pytest
import quant_reference
import torch
from quantized_inputs import Weight, block_cols, quantized
from tolerance import assert_contraction

from qwen_native import _C, ops

FORMATS = quant_reference.FORMATS
# Levels at which many tokens with 4-bit weights take the folded kernel.
FOLDING = ("avx2", "avx512", "avx512_bf16", "amx")
INNER_BLOCK = 512  # csrc/ops/folded.h: kGatedBlockCols


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out.double() - ref).norm() / ref.norm())


def matrices(rng, fmt, inter, hidden, hidden_out):
    shapes = [(inter, hidden), (inter, hidden), (hidden_out, inter)]
    return [Weight(rng, fmt, rows, cols, cols**-0.5) for rows, cols in shapes]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 8, 33])
@pytest.mark.parametrize("inter,hidden", [(95, 70), (600, 540)])
def test_exact_is_linear_swiglu_linear(isa, rng, fmt, tokens, inter, hidden):
    gate, up, down = matrices(rng, fmt, inter, hidden, 45)
    x, before = (
        torch.randn((tokens, hidden), generator=rng),
        torch.randn((tokens, 45), generator=rng),
    )
    out = ops.mlp(before.clone(), x, gate.packed, up.packed, down.packed, invariant=True)
    inner = ops.linear(x, [gate.packed, up.packed], invariant=True)
    inner = ops.swiglu(inner[:, :inter], inner[:, inter:])
    parts = ops.linear(inner, down.packed, out=before.clone(), add=True, invariant=True)
    assert torch.equal(out, parts)
    wide, _ = quantized(x, block_cols(fmt, hidden))
    inner = silu(wide @ gate.values.T) * (wide @ up.values.T)
    inner, _ = quantized(inner.float(), block_cols(fmt, inter))
    assert relative_error(out - before, inner @ down.values.T) < 3e-3  # codes on the edge of a step


@pytest.mark.parametrize("tokens", [1, 40])
def test_float_weights(isa, rng, tokens):
    gate, up = (torch.randn((70, 33), generator=rng) / 6 for _ in range(2))
    down = torch.randn((20, 70), generator=rng) / 8
    x, before = torch.randn((tokens, 33), generator=rng), torch.randn((tokens, 20), generator=rng)
    out = ops.mlp(before.clone(), x, gate, up, down)
    g, u, d = gate.double(), up.double(), down.double()
    ref = before.double() + (silu(x.double() @ g.T) * (x.double() @ u.T)) @ d.T
    base = before + (silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert_contraction(out, ref, base)


@pytest.mark.usefixtures("folded_from_8")
@pytest.mark.parametrize("fmt", ["int4_symmetric", "int4"])
@pytest.mark.parametrize(
    "tokens,inter,hidden",
    [(8, 96, 64), (31, 600, 200), (70, 1100, 1300), (513, 33, 31)],
)
def test_folded(isa, rng, fmt, tokens, inter, hidden):
    """Against the product of the packed weights the folded path's roundings cost a few percent;
    against one with these roundings made in float64 what is left are codes on the edge of a
    step."""
    gate, up, down = matrices(rng, fmt, inter, hidden, 45)
    x = torch.randn((tokens, hidden), generator=rng)
    out = ops.mlp(torch.zeros((tokens, 45)), x, gate.packed, up.packed, down.packed)
    exact = silu(x.double() @ gate.values.T) * (x.double() @ up.values.T)
    assert relative_error(out, exact @ down.values.T) < 0.03
    if isa in FOLDING:
        wide, _ = quantized(x, 1024)
        g, u, d = (w.values if isa == "avx2" else w.folded for w in (gate, up, down))
        inner, _ = quantized((silu(wide @ g.T) * (wide @ u.T)).float(), INNER_BLOCK)
        assert relative_error(out, inner @ d.T) < 0.015


@pytest.mark.usefixtures("memory_streams")
@pytest.mark.parametrize(
    "tokens,inter,hidden",
    # the last one: more weights than stay in L2, and more columns than fit L1
    [(2, 600, 200), (300, 1100, 900), (70, 33, 31), (290, 530, 1300)],
)
def test_int8_keeps_its_bits(isa, rng, tokens, inter, hidden):
    """Fused for many tokens, three ops for a few: the same bits, whatever the number of tokens."""
    gate, up, down = matrices(rng, "int8", inter, hidden, 45)
    x = torch.randn((tokens, hidden), generator=rng)
    if isa == "scalar":
        x = x[:20]
    out = ops.mlp(torch.zeros((len(x), 45)), x, gate.packed, up.packed, down.packed)
    inner = ops.linear(x, [gate.packed, up.packed])
    inner = ops.swiglu(inner[:, :inter], inner[:, inter:])
    assert torch.equal(out, ops.linear(inner, down.packed))
    for token in (0, len(x) - 1):
        one = x[token : token + 1]
        alone = ops.mlp(torch.zeros((1, 45)), one, gate.packed, up.packed, down.packed)
        assert torch.equal(alone[0], out[token])


@pytest.mark.usefixtures("folded_from_8")
@pytest.mark.parametrize("mixed", [("int8", "int4", "int4"), ("int4", "int8", "int8")])
def test_int8_beside_4_bits(isa, rng, mixed):
    """Any mixture is fused; 4-bit weights are rounded once more, for about 1 %."""
    shapes = [(600, 200), (600, 200), (45, 600)]
    gate, up, down = (Weight(rng, f, *s, s[1] ** -0.5) for f, s in zip(mixed, shapes, strict=True))
    x = torch.randn((33, 200), generator=rng)
    out = ops.mlp(torch.zeros((33, 45)), x, gate.packed, up.packed, down.packed)
    inner = silu(x.double() @ gate.values.T) * (x.double() @ up.values.T)
    assert relative_error(out, inner @ down.values.T) < 0.03


@pytest.mark.usefixtures("folded_from_8")
@pytest.mark.parametrize("fmt", ["int8", "int4_symmetric", "int4"])
@pytest.mark.parametrize("count", [1, 3])
def test_folded_rows_do_not_depend_on_each_other(isa, rng, fmt, count):
    """Nor on how many threads share the work, whose last pieces are cut along the tokens."""
    gate, up, down = matrices(rng, fmt, 600, 200, 45)
    x = torch.randn((300, 200), generator=rng)

    def run(rows: torch.Tensor) -> torch.Tensor:
        out = torch.zeros((len(rows), 45))
        return ops.mlp(out, rows, gate.packed, up.packed, down.packed)

    whole = run(x)
    threads = _C.op_threads()
    try:
        _C.set_op_threads(count)
        for tokens in (8, 16, 33, 257, 300):
            assert torch.equal(run(x[300 - tokens :]), whole[300 - tokens :]), tokens
    finally:
        _C.set_op_threads(threads)


@pytest.mark.usefixtures("memory_streams")
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(isa, rng, fmt, value):
    gate, up, down = matrices(rng, fmt, 90, 70, 45)
    x = torch.randn((20, 70), generator=rng)
    x[7, 69] = value
    out = ops.mlp(torch.zeros((20, 45)), x, gate.packed, up.packed, down.packed)
    assert torch.isnan(out[7]).all()
    assert torch.isfinite(out[[t for t in range(20) if t != 7]]).all()


def test_shapes_are_checked(rng):
    gate, up, down = (torch.zeros(shape) for shape in [(8, 4), (8, 4), (3, 8)])
    out, x = torch.zeros((2, 3)), torch.zeros((2, 4))
    for bad, message in [
        ((out, x, gate, torch.zeros((7, 4)), down), "up is"),
        ((out, x, gate, up, torch.zeros((3, 7))), "down has 7 columns"),
        ((out, torch.zeros((2, 5)), gate, up, down), "x is"),
        ((torch.zeros((2, 4)), x, gate, up, down), "out is"),
        ((torch.zeros((1, 3)), x, gate, up, down), "out is"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.mlp(*bad)
    assert torch.equal(out, torch.zeros((2, 3)))
