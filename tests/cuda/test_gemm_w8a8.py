"""csrc/kernels/cuda/gemm_w8a8.cu against the exact result."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cuda_gemm import assert_no_bank_conflicts, call_gemm
from cuda_simulator import CUDA, Simulator, dtype_value, struct
from tolerance import assert_pointwise

# tokens, rows, cols: below, at and above the tiles of 16, 64 and 128 tokens and 128 rows; columns
# that are no whole stage of 128, and enough stages to reuse the ring.
SHAPES = [
    (1, 128, 128),
    (5, 100, 144),
    (16, 136, 896),
    (17, 64, 400),
    (64, 129, 528),
    (65, 127, 144),
    (129, 130, 656),
]


@dataclass
class Gemm:
    out: torch.Tensor
    reference: torch.Tensor
    minimum_bytes: int
    split: bool

    def check(self) -> None:
        assert_pointwise(self.out, self.reference, self.reference.to(self.out.dtype))


def run(
    sim: Simulator,
    rng: torch.Generator,
    shape: tuple[int, int, int],
    *,
    bias: bool = False,
    residual: bool = False,
    add: bool = False,
    out_dtype: torch.dtype = torch.float32,
    multiprocessors: int = 4,
    invariant: bool = False,
    padding: int = 0,
    x: torch.Tensor | None = None,
) -> Gemm:
    tokens, rows, cols = shape
    if x is None:
        x = torch.randint(-127, 128, (tokens, cols), generator=rng).to(torch.int8)
    weight = torch.randint(-127, 128, (rows, cols), generator=rng).to(torch.int8)
    scale = torch.rand(rows, generator=rng)
    x_scale = torch.rand((tokens, 1), generator=rng) * 0.1
    extras = {
        "bias": torch.randn(rows, generator=rng).bfloat16() if bias else None,
        "residual": torch.randn((tokens, rows), generator=rng).bfloat16() if residual else None,
    }
    before = torch.randn((tokens, rows), generator=rng).to(out_dtype)
    out = sim.empty((tokens, rows + padding), out_dtype)
    if add:
        out.upload(torch.nn.functional.pad(before, (0, padding), value=torch.nan))
    args = struct("GemmArgs")(
        out=out.pointer,
        x=sim.upload(torch.nn.functional.pad(x, (0, padding))).pointer,
        x_scales=sim.upload(x_scale).pointer,
        weight=sim.upload(weight).pointer,
        scales=sim.upload(scale).pointer,
        **{name: sim.upload(e).pointer for name, e in extras.items() if e is not None},
        tokens=tokens,
        rows=rows,
        cols=cols,
        out_stride=rows + padding,
        x_stride=cols + padding,
        weight_stride=cols,
        residual_stride=rows if residual else 0,
        out_dtype=dtype_value(out_dtype),
        invariant=invariant,
        add=add,
    )
    plan = call_gemm(sim, "w8a8", args, multiprocessors)
    reference = (x.double() @ weight.double().T) * x_scale.double() * scale.double()
    for extra in (*extras.values(), before if add else None):
        if extra is not None:
            reference = reference + extra.double()
    result = out.tensor()
    assert torch.isnan(result[:, rows:]).all(), "wrote beyond a row"
    minimum = x.numel() + weight.numel() + tokens * rows * out_dtype.itemsize + 4 * (tokens + rows)
    return Gemm(result[:, :rows], reference, minimum, bool(plan.split))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("multiprocessors", [1, 5])
def test_is_exact_but_for_the_scales(sim, rng, shape, multiprocessors):
    run(sim, rng, shape, multiprocessors=multiprocessors).check()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rows", [72, 75])
def test_epilogue(sim, rng, bias, residual, add, rows):
    for multiprocessors in (1, 3):  # whole tiles, and tiles in parts
        result = run(
            sim,
            rng,
            (19, rows, 272),
            bias=bias,
            residual=residual,
            add=add,
            out_dtype=torch.bfloat16,
            multiprocessors=multiprocessors,
        )
        result.check()


def test_largest_sums(sim, rng):
    x = torch.full((2, 9024), 127, dtype=torch.int8)
    run(sim, rng, (2, 64, 9024), x=x, multiprocessors=1).check()


def test_rows_may_be_strided(sim, rng):
    run(sim, rng, (9, 64, 128), padding=16).check()


def test_no_tokens(sim, rng):
    run(sim, rng, (0, 64, 64))
    assert sim.counters().launches == 0


def test_invariant_results_do_not_depend_on_the_batch(sim, rng):
    x = torch.randint(-127, 128, (70, 576), generator=rng).to(torch.int8)
    results = []
    for tokens in (1, 33, 70):
        rng.manual_seed(1)
        options = {"x": x[:tokens], "invariant": True, "multiprocessors": 64}
        results.append(run(sim, rng, (tokens, 128, 576), **options).out)
    assert torch.equal(results[0], results[1][:1]) and torch.equal(results[1], results[2][:33])


@pytest.mark.parametrize("tokens", [1, 64, 128])
def test_traffic(sim, rng, tokens):
    rows, cols = 256, 1024
    options = {"out_dtype": torch.bfloat16, "multiprocessors": 1}
    result = run(sim, rng, (tokens, rows, cols), **options)
    counted = sim.counters()
    assert not result.split
    assert counted.mma == max(tokens, 16) // 16 * rows // 8 * cols // 32
    assert 32 * counted.distinct_load_sectors <= 1.01 * result.minimum_bytes
    assert_no_bank_conflicts(sim)
    if tokens == 1:
        moved = 32 * (counted.load_sectors + counted.store_sectors)
        assert result.minimum_bytes <= moved <= 1.05 * result.minimum_bytes


@pytest.mark.parametrize("tokens", [3, 20])
def test_ptx_agrees(sim, rng, tokens):
    sim.compare_with_ptx(CUDA / "gemm_w8a8.cu", CUDA / "gemm_plan.cu")
    assert run(sim, rng, (tokens, 136, 656), residual=True, multiprocessors=3).split
