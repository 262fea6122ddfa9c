"""csrc/kernels/cuda/sampling.cu against a float64 sort, and the runtime's sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_simulator import CUDA, Simulator, struct

Params = dict[str, float]
UNFILTERED: Params = {"temperature": 1.0}
FILTERS: list[Params] = [
    UNFILTERED,
    {"temperature": 0.7},
    {"top_k": 20},
    {"top_k": 1},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
]


def philox(seed: int, index: int) -> float:
    """Sampler::uniform of csrc/runtime/sampler.h."""
    mask = 2**32 - 1
    counter = [index & mask, index >> 32, 0, 0]
    key = [seed & mask, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & mask, a >> 32 ^ counter[3] ^ key[1], a & mask]
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    return ((counter[1] << 32 | counter[0]) >> 11) * 2.0**-53


def reference(logits: np.ndarray, uniform: float, params: Params) -> tuple[int, float, float]:
    """(token, its probability, distance of the draw to the nearest other token's share)."""
    scores = logits.astype(np.float64) / params.get("temperature", 1.0)
    weights = np.exp(scores - scores.max())
    ids = np.arange(len(logits))
    top_k, top_p = int(params.get("top_k", 0)), params.get("top_p", 1.0)
    min_p = params.get("min_p", 0.0)
    cuts_k = 0 < top_k < len(logits)
    if cuts_k or top_p < 1 or min_p > 0:
        ids = np.lexsort((ids, -scores))
    if cuts_k:
        ids = ids[scores[ids] >= scores[ids[top_k - 1]]]
    if top_p < 1:
        ahead = np.cumsum(weights[ids]) - weights[ids]
        ids = ids[ahead < np.float32(top_p) * weights[ids].sum()]
    if min_p > 0:
        ids = ids[weights[ids] >= np.float32(min_p)]
    total = weights[ids].sum()
    ends = np.cumsum(weights[ids])
    place = int(np.searchsorted(ends, uniform * total, side="right"))
    margin = float(np.abs(ends - uniform * total).min() / total)
    return int(ids[place]), float(weights[ids[place]] / total), margin


class Sampling:
    """One launch over rows that share their parameters but not their position."""

    def __init__(self, sim: Simulator, logits: torch.Tensor, params: Params, seed: int = 7) -> None:
        rows, vocab = logits.shape

        def column(name: str, default: float, dtype: torch.dtype) -> int:
            return sim.upload(torch.full((rows,), params.get(name, default), dtype=dtype)).pointer

        token = sim.empty((rows,), torch.int32)
        logprob = sim.empty((rows,), torch.float32)
        args = struct("SampleArgs")(
            token=token.pointer,
            logprob=logprob.pointer,
            logits=sim.upload(logits).pointer,
            temperature=column("temperature", 1.0, torch.float32),
            top_p=column("top_p", 1.0, torch.float32),
            min_p=column("min_p", 0.0, torch.float32),
            top_k=column("top_k", 0, torch.int32),
            seed=sim.upload(torch.full((rows,), seed, dtype=torch.int64)).pointer,
            index=sim.upload(torch.arange(rows)).pointer,
            rows=rows,
            vocab=vocab,
            stride=vocab,
        )
        assert sim.call("qn_cuda_sampling", args) == 0
        self.tokens = token.tensor().tolist()
        self.logprobs = logprob.tensor().tolist()


def check(logits: torch.Tensor, drawn: Sampling, params: Params, seed: int = 7) -> None:
    for row, (token, logprob) in enumerate(zip(drawn.tokens, drawn.logprobs, strict=True)):
        uniform = philox(seed, row)
        expected, probability, margin = reference(logits[row].numpy(), uniform, params)
        # 2^-22 of every weight is lost to exp2, 2^-31 of the largest to its rounding.
        if margin > 1e-5:
            assert token == expected, f"row {row}"
            assert abs(np.exp(logprob) - probability) <= 1e-5 * max(probability, 0.1)


@pytest.mark.parametrize("params", FILTERS)
@pytest.mark.parametrize("vocab", [1, 5, 129, 3000])
def test_matches_a_sort(sim, rng, params, vocab):
    logits = torch.randn((4, vocab), generator=rng) * 3
    check(logits, Sampling(sim, logits, params), params)


@pytest.mark.parametrize("params", FILTERS)
def test_ties_go_by_id(sim, rng, params):
    """Few different logits, so that bins are full of equals and ranks decide."""
    logits = torch.randint(0, 3, (3, 4000), generator=rng).float()
    check(logits, Sampling(sim, logits, params), params)


def test_the_tail_shares_one_bin(sim, rng):
    """Far below the largest logit all distances fall into the last bin; ranks sort it out."""
    logits = torch.full((2, 3000), -40.0) - torch.rand((2, 3000), generator=rng)
    logits[:, 17] = 0.0
    params = {"top_k": 2500, "temperature": 1.0}
    check(logits, Sampling(sim, logits, params), params)


def test_greedy_takes_the_first_of_equals(sim):
    logits = torch.zeros((2, 3000))
    logits[0, [77, 2500]] = 1.0
    logits[1, 2999] = 5.0
    drawn = Sampling(sim, logits, {"temperature": 0.0})
    assert drawn.tokens == [77, 2999] and drawn.logprobs == [0.0, 0.0]


def test_forbidden_tokens_are_never_drawn(sim, rng):
    logits = torch.full((20, 300), -torch.inf)
    logits[:, [3, 250]] = torch.randn((20, 2), generator=rng)
    for params in FILTERS:
        assert set(Sampling(sim, logits, params).tokens) <= {3, 250}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_give_minus_one(sim, temperature):
    logits = torch.zeros((4, 100))
    logits[0, 50], logits[1, 7], logits[2] = torch.nan, torch.inf, -torch.inf
    assert Sampling(sim, logits, {"temperature": temperature}).tokens[:3] == [-1, -1, -1]


def test_draws_follow_the_distribution(sim):
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().expand(64, 4).contiguous()
    counts = torch.bincount(torch.tensor(Sampling(sim, logits, UNFILTERED).tokens), minlength=4)
    expected = torch.tensor([32.0, 16.0, 8.0, 8.0])
    # Chi-square with 3 degrees of freedom: 16.3 at a chance of 0.1 %.
    assert ((counts - expected).square() / expected).sum() < 16.3


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_order_of_threads_does_not_matter(sim, rng, seed):
    logits = torch.randn((2, 3000), generator=rng)
    in_order = [Sampling(sim, logits, params) for params in FILTERS]
    sim.configure(seed=seed)
    again = [Sampling(sim, logits, params) for params in FILTERS]
    assert [s.tokens for s in in_order] == [s.tokens for s in again]
    assert [s.logprobs for s in in_order] == [s.logprobs for s in again]


def test_traffic(sim, rng):
    logits = torch.randn((1, 4096), generator=rng)
    Sampling(sim, logits, UNFILTERED)
    counted = sim.counters()
    assert counted.load_bytes <= 1.1 * 3 * 4 * 4096  # the largest, the histogram, its bin
    assert counted.load_sectors <= 1.01 * counted.load_sectors_needed


@pytest.mark.parametrize("params", [FILTERS[0], FILTERS[-1]])
def test_ptx_agrees(sim, rng, params):
    sim.compare_with_ptx(CUDA / "sampling.cu")
    Sampling(sim, torch.randn((1, 600), generator=rng), params)
