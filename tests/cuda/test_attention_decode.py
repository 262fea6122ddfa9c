"""csrc/kernels/cuda/attention_decode.cu against float64."""

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
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (14, 2)])
def test_bf16_cache(sim, rng, head_dim, heads):
    check(run_attention(sim, rng, [1, 15, 17, 64, 70], *heads, head_dim))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (14, 2)])
def test_int8_cache(sim, rng, head_dim, heads):
    check(run_attention(sim, rng, [1, 15, 17, 64, 70], *heads, head_dim, bits=8))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("heads", [(4, 1), (5, 1)])  # parts of 256 and of 512 keys, x 2 in int8
def test_parts(sim, rng, bits, heads):
    part = (256 if heads == (4, 1) else 512) * 16 // bits
    check(run_attention(sim, rng, [part - 1, part, part + 1], *heads, 64, bits=bits))


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("window", [1, 16, 100, 256, 300])
def test_window(sim, rng, bits, window):
    check(run_attention(sim, rng, [5, 300, 530], 2, 1, 64, bits=bits, window=window))


@pytest.mark.parametrize("page_shift", [4, 5, 8])
@pytest.mark.parametrize("bits", [16, 8])
def test_page_sizes(sim, rng, page_shift, bits):
    check(run_attention(sim, rng, [33, 270], 2, 1, 64, bits=bits, page_shift=page_shift))


def test_more_than_16_heads_share_a_kv_head(sim, rng):
    check(run_attention(sim, rng, [40], 40, 2, 64))


@pytest.mark.parametrize("query_size", [1e-3, 30.0])
def test_flat_and_peaked_softmax(sim, rng, query_size):
    check(run_attention(sim, rng, [100, 300], 4, 2, 64, query_size=query_size))


@pytest.mark.parametrize("bits", [16, 8])
def test_a_result_does_not_depend_on_the_batch(sim, rng, bits):
    alone = run_attention(sim, rng, [600], 4, 1, 64, bits=bits)
    batch = run_attention(sim, rng, [5, 600, 780], 4, 1, 64, bits=bits)
    assert torch.equal(batch.out[1], alone.out[0])


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("bits", [16, 8])
def test_order_of_threads_does_not_matter(sim, rng, seed, bits):
    in_order = run_attention(sim, rng, [300, 20], 4, 2, 64, bits=bits)
    sim.configure(seed=seed)
    assert torch.equal(run_attention(sim, rng, [300, 20], 4, 2, 64, bits=bits).out, in_order.out)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("heads", [(8, 2), (14, 2)])
def test_traffic_is_within_5_percent(sim, rng, bits, heads):
    result = run_attention(sim, rng, [1024], *heads, 128, bits=bits)
    counted = sim.counters()
    assert counted.load_bytes + counted.store_bytes <= 1.05 * result.minimum_bytes
    assert counted.load_sectors <= 1.01 * counted.load_sectors_needed
    assert counted.ldmatrix_wavefronts == 4 * counted.ldmatrix


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("bits", [16, 8])
def test_no_bank_conflicts(sim, rng, head_dim, bits):
    run_attention(sim, rng, [150], 4, 1, head_dim, bits=bits)
    # q of an int8 cache and the sum over the warps, each once per block.
    assert_no_bank_conflicts(sim, "ld8(&q[", "&result.out[w]", ldmatrix=bits == 16)


@pytest.mark.parametrize(("head_dim", "bits"), [(64, 16), (80, 16), (64, 8), (80, 8)])
def test_ptx_agrees(sim, rng, head_dim, bits):
    sim.compare_with_ptx(CUDA / "attention_decode.cu")
    run_attention(sim, rng, [17, 520 * 16 // bits], 2, 1, head_dim, bits=bits, window=300)
