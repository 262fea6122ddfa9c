"""csrc/kernels/cuda/packed_attention_bwd.cu against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_documents import Documents
from cuda_gemm import assert_no_bank_conflicts
from cuda_simulator import CUDA
from gradients import assert_gradients


def check(documents: Documents) -> None:
    grads = documents.backward(*documents.forward())
    inputs = (documents.q, documents.k, documents.v)
    assert_gradients(grads, documents.eager, inputs, documents.dout)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (7, 1)])
def test_matches_autograd(sim, rng, head_dim, heads):
    check(Documents.random(sim, rng, [1, 0, 63, 65], *heads, head_dim))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [2, 16, 50, 64, 200])
def test_window(sim, rng, head_dim, window):
    check(Documents.random(sim, rng, [150, 20], 2, 1, head_dim, window=window))


@pytest.mark.parametrize("query_size", [1e-3, 10.0])
def test_flat_and_peaked_softmax(sim, rng, query_size):
    check(Documents.random(sim, rng, [100], 2, 2, 64, query_size=query_size))


def test_rows_may_be_strided(sim, rng):
    check(Documents.random(sim, rng, [37, 70], 4, 2, 64, padding=24))


def test_no_documents(sim, rng):
    documents = Documents.random(sim, rng, [0, 0], 2, 1, 64)
    documents.backward(*documents.forward())
    assert sim.counters().launches == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_threads_does_not_matter(sim, rng, seed):
    documents = Documents.random(sim, rng, [70, 3], 4, 2, 64)
    forward = documents.forward()
    in_order = documents.backward(*forward)
    sim.configure(seed=seed)
    again = documents.backward(*forward)
    assert all(torch.equal(a, b) for a, b in zip(in_order, again, strict=True))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_traffic(sim, rng, head_dim):
    tokens, heads = 128, 2
    documents = Documents.random(sim, rng, [tokens], heads, 1, head_dim)
    forward = documents.forward()
    before = sim.counters()
    documents.backward(*forward)
    counted = sim.counters()
    for name, _ in counted._fields_:
        setattr(counted, name, getattr(counted, name) - getattr(before, name))
    row = head_dim * 2
    # Keys: two blocks of 64, which rows 0 .. and rows 128 .. of the 256 see.
    keys = 2 * tokens * row + (256 + 128) * 2 * row
    # Queries: four blocks of 64 rows (32 tokens), each with the keys up to its last token.
    queries = 2 * tokens * heads * row + sum(32 * (i + 1) for i in range(4)) * 2 * row
    delta = 2 * tokens * heads * row
    moved = keys + queries + delta
    assert moved <= counted.load_bytes <= 1.05 * moved
    assert counted.load_sectors <= 1.05 * counted.load_sectors_needed
    grads = (2 * heads + 2 * 2) // 2 * tokens * row
    assert 32 * counted.distinct_store_sectors == grads + tokens * heads * 4
    # 16 own rows x 8 passing rows: head_dim / 16 mma each for S, dP and every sum.
    tile = 64 if head_dim == 64 else 32
    pairs = (
        4 * (256 + 128) // 8 * 4
        + 4 * sum(-(-32 * (i + 1) // tile) for i in range(4)) * tile // 8 * 3
    )
    assert counted.mma == pairs * head_dim // 16
    assert_no_bank_conflicts(sim)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_ptx_agrees(sim, rng, head_dim):
    documents = Documents.random(sim, rng, [3, 70], 2, 1, head_dim, window=66)
    forward = documents.forward()
    sim.compare_with_ptx(CUDA / "packed_attention_bwd.cu")
    documents.backward(*forward)
