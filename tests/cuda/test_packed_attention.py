"""csrc/kernels/cuda/packed_attention.cu against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_documents import Documents
from cuda_gemm import assert_no_bank_conflicts
from cuda_simulator import CUDA
from tolerance import assert_contraction


def check(documents: Documents) -> None:
    out, lse = documents.forward()
    inputs = (documents.q, documents.k, documents.v)
    reference = documents.eager(*(x.double() for x in inputs))
    assert_contraction(out, reference, documents.eager(*inputs))
    assert (lse.double() - documents.log_sum_exp()).abs().max() < 1e-5 * max(1, lse.abs().max())


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (7, 1)])
def test_matches_reference(sim, rng, head_dim, heads):
    check(Documents.random(sim, rng, [1, 0, 63, 65], *heads, head_dim))


@pytest.mark.parametrize("window", [1, 16, 50, 64, 200])
def test_window(sim, rng, window):
    check(Documents.random(sim, rng, [150, 20], 2, 1, 64, window=window))


@pytest.mark.parametrize("query_size", [1e-3, 30.0])
def test_flat_and_peaked_softmax(sim, rng, query_size):
    check(Documents.random(sim, rng, [100], 2, 2, 64, query_size=query_size))


def test_rows_may_be_strided(sim, rng):
    check(Documents.random(sim, rng, [37, 70], 4, 2, 64, padding=24))


def test_without_the_log_sum_exp(sim, rng):
    documents = Documents.random(sim, rng, [40], 2, 1, 64)
    out, lse = documents.forward(with_lse=False)
    assert torch.equal(out, documents.forward()[0]) and torch.isnan(lse).all()


def test_no_documents(sim, rng):
    Documents.random(sim, rng, [], 2, 1, 64).forward()
    Documents.random(sim, rng, [0, 0], 2, 1, 64).forward()
    assert sim.counters().launches == 0


def test_documents_do_not_depend_on_each_other(sim, rng):
    documents = Documents.random(sim, rng, [70, 33], 4, 2, 64)
    together = documents.forward()[0]
    documents.lengths = [33]
    documents.q, documents.k, documents.v = (
        x[70:] for x in (documents.q, documents.k, documents.v)
    )
    assert torch.equal(documents.forward()[0], together[70:])


@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_threads_does_not_matter(sim, rng, seed):
    documents = Documents.random(sim, rng, [70, 3], 4, 2, 64)
    in_order = documents.forward()
    sim.configure(seed=seed)
    permuted = documents.forward()
    assert torch.equal(in_order[0], permuted[0]) and torch.equal(in_order[1], permuted[1])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_traffic(sim, rng, head_dim):
    tokens = 128
    Documents.random(sim, rng, [tokens], 4, 2, head_dim).forward()
    counted = sim.counters()
    # Blocks of 32 tokens x 2 heads; block i reads the keys and values of 32 (i + 1) tokens.
    read = 2 * sum(32 * (i + 1) * 2 * head_dim * 2 for i in range(4))
    q = tokens * 4 * head_dim * 2
    assert read + q <= counted.load_bytes <= 1.02 * (read + q)
    assert counted.load_sectors <= 1.01 * counted.load_sectors_needed
    assert 32 * counted.distinct_store_sectors == q + tokens * 4 * 4
    # Per tile of 64 keys and 16 rows: 8 n-tiles in head_dim / 16 steps, and as many for P V.
    assert counted.mma == 2 * 4 * (1 + 1 + 2 + 2) * head_dim
    assert_no_bank_conflicts(sim)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_ptx_agrees(sim, rng, head_dim):
    sim.compare_with_ptx(CUDA / "packed_attention.cu")
    Documents.random(sim, rng, [3, 70], 2, 1, head_dim, window=66).forward()
