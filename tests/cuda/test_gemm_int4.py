"""csrc/kernels/cuda/gemm_int4.cu against float64 on the dequantised weight."""

from __future__ import annotations

import pytest
import torch
from cuda_gemm import assert_no_bank_conflicts, random_weight, run_gemm
from cuda_simulator import CUDA


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", [(1, 128, 64), (3, 192, 320), (17, 72, 104), (70, 136, 456)])
def test_matches_reference(sim, rng, shape, group_size, zeros):
    tokens, rows, cols = shape
    weight = random_weight(sim, rng, (rows, cols), 4, group_size, zeros)
    run_gemm(sim, rng, weight, tokens, group_size=group_size).check()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("tokens", [16, 33, 129])
def test_epilogue(sim, rng, tokens, zeros):
    weight = random_weight(sim, rng, (130, 264), 4, 64, zeros)
    run_gemm(sim, rng, weight, tokens, group_size=64, bias=True, residual=True).check()


@pytest.mark.parametrize("group_size", [32, 64, 128, 1024])
@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 7])
def test_a_split_may_begin_inside_a_group(sim, rng, group_size, multiprocessors):
    weight = random_weight(sim, rng, (128, 1000), 4, group_size, True)
    options = {"group_size": group_size, "multiprocessors": multiprocessors}
    run_gemm(sim, rng, weight, 2, **options, out_dtype=torch.float32).check()


def test_invariant_results_do_not_depend_on_the_batch(sim, rng):
    weight = random_weight(sim, rng, (128, 576), 4, 32)
    x = torch.randn((65, 576), generator=rng).bfloat16()
    options = {"invariant": True, "multiprocessors": 64}
    one = run_gemm(sim, rng, weight, 1, x=x[:1], **options)
    many = run_gemm(sim, rng, weight, 65, x=x, **options)
    assert torch.equal(one.out, many.out[:1])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_order_of_threads_does_not_matter(sim, rng, seed):
    weight = random_weight(sim, rng, (192, 448), 4, 128, True)
    x = torch.randn((20, 448), generator=rng).bfloat16()
    in_order = run_gemm(sim, rng, weight, 20, group_size=128, x=x)
    sim.configure(seed=seed)
    assert torch.equal(run_gemm(sim, rng, weight, 20, group_size=128, x=x).out, in_order.out)


@pytest.mark.parametrize("zeros", [False, True])
def test_batch_1_traffic_is_within_5_percent(sim, rng, zeros):
    rows, cols = 2048, 2048
    weight = random_weight(sim, rng, (rows, cols), 4, 128, zeros)
    result = run_gemm(sim, rng, weight, 1, group_size=128, multiprocessors=16)
    result.check()
    assert result.split
    counted = sim.counters()
    assert counted.load_bytes + counted.store_bytes <= 1.05 * result.minimum_bytes
    assert counted.load_sectors <= 1.01 * counted.load_sectors_needed
    assert_no_bank_conflicts(sim)


def test_prefill_meets_no_bank_twice(sim, rng):
    weight = random_weight(sim, rng, (128, 256), 4, 32, True)
    run_gemm(sim, rng, weight, 128, multiprocessors=1)
    assert_no_bank_conflicts(sim)


@pytest.mark.parametrize("tokens", [3, 20])
def test_ptx_agrees(sim, rng, tokens):
    weight = random_weight(sim, rng, (136, 328), 4, 32, zeros=True)
    sim.compare_with_ptx(CUDA / "gemm_int4.cu", CUDA / "gemm_plan.cu")
    assert run_gemm(sim, rng, weight, tokens, bias=True, multiprocessors=3).split
