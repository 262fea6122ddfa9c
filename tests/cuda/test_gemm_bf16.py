"""csrc/kernels/cuda/gemm_bf16.cu (and gemm_plan.cu) against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_gemm import run_gemm
from cuda_simulator import CUDA

# tokens, rows, cols: below, at and above the tiles of 16, 64 and 128 tokens and 128 rows; columns
# that are no whole stage, and enough stages to reuse the ring.
SHAPES = [
    (1, 128, 64),
    (5, 100, 72),
    (16, 136, 448),
    (17, 64, 200),
    (64, 129, 264),
    (65, 127, 72),
    (129, 130, 328),
]


def weight_of(rng: torch.Generator, rows: int, cols: int) -> torch.Tensor:
    return torch.randn((rows, cols), generator=rng).bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("multiprocessors", [1, 5])
def test_matches_reference(sim, rng, shape, multiprocessors):
    tokens, rows, cols = shape
    weight = weight_of(rng, rows, cols)
    run_gemm(sim, rng, weight, tokens, multiprocessors=multiprocessors).check()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [72, 75])
def test_epilogue(sim, rng, bias, residual, out_dtype, rows):
    weight = weight_of(rng, rows, 136)
    for multiprocessors in (1, 3):  # whole tiles, and tiles in parts
        result = run_gemm(
            sim,
            rng,
            weight,
            19,
            bias=bias,
            residual=residual,
            out_dtype=out_dtype,
            multiprocessors=multiprocessors,
        )
        result.check()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scale_of_the_input(sim, rng, scale):
    x = (torch.randn((3, 192), generator=rng) * scale).bfloat16()
    run_gemm(sim, rng, weight_of(rng, 128, 192), 3, x=x).check()


def test_rows_may_be_strided(sim, rng):
    run_gemm(sim, rng, weight_of(rng, 64, 128), 9, padding=8).check()


def test_no_tokens(sim, rng):
    run_gemm(sim, rng, weight_of(rng, 64, 64), 0)
    assert sim.counters().launches == 0


def test_invariant_results_do_not_depend_on_the_batch(sim, rng):
    weight = weight_of(rng, 128, 576)
    x = torch.randn((130, 576), generator=rng).bfloat16()
    alone = [
        run_gemm(sim, rng, weight, n, x=x[:n], invariant=True, multiprocessors=64).out
        for n in (1, 33, 130)
    ]
    assert torch.equal(alone[0], alone[1][:1]) and torch.equal(alone[1], alone[2][:33])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_order_of_threads_does_not_matter(sim, rng, seed):
    weight = weight_of(rng, 200, 328)
    x = torch.randn((70, 328), generator=rng).bfloat16()
    in_order = run_gemm(sim, rng, weight, 70, x=x)
    assert in_order.split
    sim.configure(seed=seed)
    assert torch.equal(run_gemm(sim, rng, weight, 70, x=x).out, in_order.out)


@pytest.mark.parametrize("tokens", [16, 64, 128])
def test_traffic(sim, rng, tokens):
    rows, cols = 256, 512
    result = run_gemm(sim, rng, weight_of(rng, rows, cols), tokens, multiprocessors=1)
    counted = sim.counters()
    assert not result.split and result.blocks == 2
    assert counted.load_bytes == 2 * (rows * cols + 2 * tokens * cols)  # x once per 128 rows
    assert counted.load_sectors == counted.load_sectors_needed
    assert counted.store_sectors == counted.store_sectors_needed == tokens * rows * 2 // 32
    assert counted.mma == tokens // 16 * rows // 8 * cols // 16
    assert counted.ldmatrix_wavefronts == 4 * counted.ldmatrix


@pytest.mark.parametrize("tokens", [3, 20])
def test_ptx_agrees(sim, rng, tokens):
    weight = weight_of(rng, 136, 328)
    sim.compare_with_ptx(CUDA / "gemm_bf16.cu", CUDA / "gemm_plan.cu")
    assert run_gemm(sim, rng, weight, tokens, residual=True, multiprocessors=3).split
