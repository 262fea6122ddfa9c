"""csrc/kernels/cuda/gemm_int8.cu against float64 on the dequantised weight."""

from __future__ import annotations

import pytest
import torch
from cuda_gemm import assert_no_bank_conflicts, random_weight, run_gemm
from cuda_simulator import CUDA


@pytest.mark.parametrize("group_size", [32, 64, 128, 512])
@pytest.mark.parametrize("shape", [(1, 128, 64), (3, 192, 320), (17, 72, 104), (70, 136, 456)])
def test_matches_reference(sim, rng, shape, group_size):
    tokens, rows, cols = shape
    weight = random_weight(sim, rng, (rows, cols), 8, group_size)
    run_gemm(sim, rng, weight, tokens, group_size=group_size).check()


@pytest.mark.parametrize("tokens", [16, 33, 129])
def test_epilogue(sim, rng, tokens):
    weight = random_weight(sim, rng, (130, 264), 8, 64)
    run_gemm(sim, rng, weight, tokens, group_size=64, bias=True, residual=True).check()


def test_invariant_results_do_not_depend_on_the_batch(sim, rng):
    weight = random_weight(sim, rng, (128, 576), 8, 32)
    x = torch.randn((65, 576), generator=rng).bfloat16()
    options = {"invariant": True, "multiprocessors": 64}
    one = run_gemm(sim, rng, weight, 1, x=x[:1], **options)
    many = run_gemm(sim, rng, weight, 65, x=x, **options)
    assert torch.equal(one.out, many.out[:1])


@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_threads_does_not_matter(sim, rng, seed):
    weight = random_weight(sim, rng, (192, 448), 8, 64)
    x = torch.randn((20, 448), generator=rng).bfloat16()
    in_order = run_gemm(sim, rng, weight, 20, group_size=64, x=x)
    sim.configure(seed=seed)
    assert torch.equal(run_gemm(sim, rng, weight, 20, group_size=64, x=x).out, in_order.out)


def test_batch_1_traffic_is_within_5_percent(sim, rng):
    weight = random_weight(sim, rng, (1024, 1024), 8, 32)
    result = run_gemm(sim, rng, weight, 1, multiprocessors=4)
    result.check()
    counted = sim.counters()
    assert counted.load_bytes + counted.store_bytes <= 1.05 * result.minimum_bytes
    assert_no_bank_conflicts(sim)


@pytest.mark.parametrize("tokens", [3, 20])
def test_ptx_agrees(sim, rng, tokens):
    weight = random_weight(sim, rng, (136, 328), 8, 32)
    sim.compare_with_ptx(CUDA / "gemm_int8.cu", CUDA / "gemm_plan.cu")
    assert run_gemm(sim, rng, weight, tokens, bias=True, multiprocessors=3).split
