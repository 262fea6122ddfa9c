"""csrc/kernels/cuda/attention_prefill.cu against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_gemm import assert_no_bank_conflicts
from cuda_kv import run_attention
from cuda_simulator import CUDA
from tolerance import assert_contraction


def check(result):
    assert_contraction(result.out, result.reference, result.plain)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("heads", [(2, 2), (7, 1)])
def test_bf16_cache(sim, rng, head_dim, heads):
    check(run_attention(sim, rng, [1, 63, 65], *heads, head_dim, query_lens=[1, 63, 65]))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_int8_cache(sim, rng, head_dim, heads):
    lens = {"query_lens": [1, 64, 66]}
    check(run_attention(sim, rng, [1, 64, 66], *heads, head_dim, bits=8, **lens))


@pytest.mark.parametrize("bits", [16, 8])
def test_cached_keys_before_the_queries(sim, rng, bits):
    lens = {"query_lens": [1, 5, 40, 64]}
    check(run_attention(sim, rng, [130, 64, 200, 65], 4, 2, 64, bits=bits, **lens))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("window", [1, 16, 50, 64, 200])
def test_window(sim, rng, bits, window):
    lens = {"query_lens": [100, 20]}
    check(run_attention(sim, rng, [150, 200], 2, 1, 64, bits=bits, window=window, **lens))


@pytest.mark.parametrize("page_shift", [4, 5, 8])
def test_page_sizes(sim, rng, page_shift):
    lens = {"query_lens": [33, 7]}
    check(run_attention(sim, rng, [33, 270], 2, 1, 64, page_shift=page_shift, **lens))


@pytest.mark.parametrize("query_size", [1e-3, 30.0])
def test_flat_and_peaked_softmax(sim, rng, query_size):
    check(run_attention(sim, rng, [100], 2, 2, 64, query_lens=[100], query_size=query_size))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("bits", [16, 8])
def test_order_of_threads_does_not_matter(sim, rng, seed, bits):
    options = {"query_lens": [70, 3], "bits": bits}
    in_order = run_attention(sim, rng, [140, 20], 4, 2, 64, **options)
    sim.configure(seed=seed)
    assert torch.equal(run_attention(sim, rng, [140, 20], 4, 2, 64, **options).out, in_order.out)


def test_traffic(sim, rng):
    tokens, head_dim = 128, 128
    run_attention(sim, rng, [tokens], 4, 2, head_dim, query_lens=[tokens])
    counted = sim.counters()
    # Blocks of 32 tokens x 2 heads; block i reads the keys and values of 32 (i + 1) tokens.
    read = 2 * sum(32 * (i + 1) * 2 * head_dim * 2 for i in range(4))
    q = tokens * 4 * head_dim * 2
    assert read + q <= counted.load_bytes <= 1.02 * (read + q)
    assert counted.load_sectors <= 1.01 * counted.load_sectors_needed
    assert counted.store_sectors == counted.store_sectors_needed == q // 32
    assert counted.ldmatrix_wavefronts == 4 * counted.ldmatrix
    # Per tile of 64 keys and 16 rows: 8 n-tiles x 8 steps, and 4 steps x 16 n-tiles.
    assert counted.mma == 2 * 4 * (1 + 1 + 2 + 2) * (64 + 64)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("bits", [16, 8])
def test_no_bank_conflicts(sim, rng, head_dim, bits):
    run_attention(sim, rng, [150], 2, 1, head_dim, query_lens=[80], bits=bits)
    # q of an int8 cache, once per block.
    assert_no_bank_conflicts(sim, "ld8(&q[", ldmatrix=bits == 16)


@pytest.mark.parametrize(("head_dim", "bits"), [(64, 16), (80, 16), (64, 8), (80, 8)])
def test_ptx_agrees(sim, rng, head_dim, bits):
    sim.compare_with_ptx(CUDA / "attention_prefill.cu")
    lens = {"query_lens": [3, 40]}
    run_attention(sim, rng, [90, 40], 2, 1, head_dim, bits=bits, window=70, **lens)
