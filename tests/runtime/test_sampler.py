"""csrc/runtime/sampler.cpp against transformers' processors in float64 and against counted
draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from qwen_native import _C, ops

INF, NAN = float("inf"), float("nan")


def sampler(prompt=(), **params):
    bias = list(params.pop("logit_bias", {}).items())
    return _C.Sampler(_C.SamplingParams(logit_bias=bias, **params), list(prompt))


def expected_logits(logits, prompt, output, params):
    """The logits after bias and penalties, in float64; the repetition penalty is transformers'."""
    scores = torch.from_numpy(logits).double()[None].clone()
    for token, bias in params.get("logit_bias", {}).items():
        scores[0, token] += bias
    if params.get("repetition_penalty", 1.0) != 1.0 and (prompt or output):
        ids = torch.tensor([[*prompt, *output]])
        scores = hf.RepetitionPenaltyLogitsProcessor(params["repetition_penalty"])(ids, scores)
    for token in set(output):
        scores[0, token] -= params.get("presence_penalty", 0.0)
        scores[0, token] -= params.get("frequency_penalty", 0.0) * output.count(token)
    return scores


def expected_distribution(logits, prompt=(), output=(), **params):
    """Probabilities [vocab], float64, by transformers' warpers in their order.

    Also returns how far the nearest cumulative probability is from the top_p cut and the nearest
    ratio from the min_p cut: closer than float32 rounding, either side is right.
    """
    scores = expected_logits(logits, list(prompt), list(output), params)
    margin = 1.0
    scores = scores / params.get("temperature", 1.0)
    if params.get("top_k", 0) > 0:
        scores = hf.TopKLogitsWarper(params["top_k"])(None, scores)
    if params.get("top_p", 1.0) < 1.0:
        cumulative = scores.softmax(-1).sort(descending=False).values.cumsum(-1)
        margin = min(margin, (cumulative - (1 - params["top_p"])).abs().min().item())
        scores = hf.TopPLogitsWarper(params["top_p"])(None, scores)
    if params.get("min_p", 0.0) > 0.0:
        p = scores.softmax(-1)
        margin = min(margin, (p / p.max() - params["min_p"]).abs().min().item())
        scores = hf.MinPLogitsWarper(params["min_p"])(None, scores)
    return scores.softmax(-1)[0].numpy(), margin


def dense(pairs, vocab):
    out = np.zeros(vocab)
    for token, probability in pairs:
        out[token] = probability
    return out


def assert_same(ours, theirs):
    assert np.array_equal(ours > 0, theirs > 0)
    # float32 scores up to about 100 round by 4e-6, which is the relative error of their
    # exponentials.
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-12)


@settings(max_examples=300, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 100, 128, 129, 1000, 9001]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 20, 500, 20000]),
    top_p=st.sampled_from([1.0, 0.95, 0.8, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_distribution_equals_transformers(vocab, spread, seed, **params):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(vocab) * spread).astype(np.float32)
    prompt = rng.integers(0, vocab, 30).tolist()
    params = {
        name: float(np.float32(value)) if name != "top_k" else value
        for name, value in params.items()
    }
    theirs, margin = expected_distribution(logits, prompt, **params)
    if margin < 1e-5 and params["min_p"] < 1.0:
        return
    before = logits.copy()
    ours = dense(sampler(prompt, **params).distribution(logits), vocab)
    assert np.array_equal(logits, before)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [0.5, 1.5])
def test_penalties_follow_the_output(isa, name, value):
    rng = np.random.default_rng(4)
    logits = rng.standard_normal(50).astype(np.float32) * 0.2
    prompt, output = [3, 3, 7, 49, 1000], []
    ours = sampler(prompt, seed=9, **{name: value})
    known = [token for token in prompt if token < 50]
    for _ in range(40):
        theirs, _ = expected_distribution(logits, known, output, **{name: value})
        assert_same(dense(ours.distribution(logits), 50), theirs)
        output.append(ours.sample(logits)[0])
    assert len(set(output)) > 5


def test_logit_bias_forces_and_forbids(isa):
    logits = np.zeros(300, np.float32)
    logits[5] = 10
    assert sampler(temperature=0.0).sample(logits)[0] == 5
    assert sampler(temperature=0.0, logit_bias={5: -INF}).sample(logits)[0] == 0
    assert sampler(temperature=0.0, logit_bias={200: 10.5}).sample(logits)[0] == 200
    ours = sampler(logit_bias={5: -INF, 7: 3.0}, seed=1)
    theirs, _ = expected_distribution(logits, logit_bias={5: -INF, 7: 3.0})
    assert_same(dense(ours.distribution(logits), 300), theirs)
    assert all(ours.sample(logits)[0] != 5 for _ in range(200))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 8},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize("vocab", [30, 300])
def test_draws_follow_the_distribution(isa, params, vocab):
    """Chi-square over 4000 draws with fixed seeds."""
    logits = np.random.default_rng(2).standard_normal(vocab).astype(np.float32) * 1.5
    probability = dense(sampler(**params).distribution(logits), vocab)
    draws = 4000
    ours = sampler(seed=20230928, **params)
    counts = np.bincount([ours.sample(logits)[0] for _ in range(draws)], minlength=vocab)
    assert not counts[probability == 0].any()
    expected = probability * draws
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    # Mean freedom, variance 2 * freedom: five standard deviations.
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 0.6},
        {"top_k": 8},
        {"top_p": 0.7, "temperature": 1.3},
        {"min_p": 0.1, "logit_bias": {3: 2.0}},
        {"top_p": 0.9, "frequency_penalty": 0.5},
    ],
)
def test_the_probability_of_the_draw_is_reported(isa, params):
    logits = np.random.default_rng(5).standard_normal(300).astype(np.float32) * 1.5
    ours, output = sampler(seed=3, **params), []
    for _ in range(20):
        theirs = np.eye(300)[logits.argmax()]
        if params.get("temperature") != 0.0:
            theirs, _ = expected_distribution(logits, (), output, **params)
        token, _, _, drawn = ours.sample(logits)
        # float32 weights of up to 300 tokens, as in assert_same
        assert drawn == pytest.approx(math.log(theirs[token]), abs=2e-5)
        output.append(token)


def philox(seed: int, index: int) -> tuple[int, ...]:
    """Philox4x32-10 with Python integers."""
    x, mask = [index & 0xFFFFFFFF, index >> 32, 0, 0], 0xFFFFFFFF
    key = [seed & mask, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(b >> 32) ^ x[1] ^ key[0], b & mask, (a >> 32) ^ x[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return tuple(x)


def test_uniform_is_philox():
    # Known answer of Random123 (kat_vectors, philox4x32 10, all zero).
    assert philox(0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    for seed, index in [(0, 0), (1, 0), (0, 1), (2**64 - 1, 2**64 - 1), (123456789012345, 77)]:
        low, high = philox(seed, index)[:2]
        assert _C.Sampler.uniform(seed, index) == ((high << 32 | low) >> 11) / 2**53


def test_token_depends_on_seed_index_and_logits_only(isa):
    rng = np.random.default_rng(8)
    rows = rng.standard_normal((20, 5000)).astype(np.float32)
    results = []
    for threads in (1, 2):
        before = _C.op_threads()
        _C.set_op_threads(threads)
        for params in ({}, {"top_p": 0.9}, {"top_k": 50}):
            ours, other = sampler(seed=5, **params), sampler(seed=6, **params)
            drawn = []
            for row in rows:
                other.sample(row)
                drawn.append(ours.sample(row))
            results.append(drawn)
        _C.set_op_threads(before)
    assert results[:3] == results[3:]
    again = sampler(seed=5)
    assert [again.sample(row) for row in rows] == results[0]
    changed = sampler(seed=6)
    assert [changed.sample(row)[0] for row in rows] != [token for token, *_ in results[0]]


@pytest.mark.parametrize("count", [-1, 0, 1, 5, 200])
def test_logprobs_are_of_the_raw_logits(isa, count):
    logits = np.random.default_rng(1).standard_normal(1000).astype(np.float32) * 4
    logits[77] = logits[500] = 20.0
    total = np.float32(ops.log_sum_exp(logits))
    ours = sampler(
        [3], temperature=0.3, repetition_penalty=2.0, logit_bias={9: 60.0}, logprobs=count
    )
    token, logprob, top, _ = ours.sample(logits)
    assert token == 9
    assert logprob == (None if count < 0 else float(logits[9] - total))
    if logprob is None:
        return
    order = np.lexsort((np.arange(1000), -logits))[: max(count, 0)]
    assert [t for t, _ in top] == order.tolist()
    assert [p for _, p in top] == [float(logits[t] - total) for t in order]
    reference = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    assert abs(logprob - reference[9].item()) < 1e-5


def test_greedy_takes_the_lowest_of_equals(isa):
    logits = np.zeros(151936, np.float32)
    logits[[70000, 70001, 151935]] = 3.0
    assert sampler(temperature=0.0).sample(logits)[0] == 70000
    assert sampler([70000], temperature=0.0, repetition_penalty=1.1).sample(logits)[0] == 70001


def test_ties_at_top_k_are_kept_and_flat_logits_work(isa):
    logits = np.zeros(1000, np.float32)
    assert len(sampler(top_k=5).distribution(logits)) == 1000
    assert len(sampler(top_p=0.25).distribution(logits)) == 250
    logits[10], logits[[20, 30, 40]] = 2.0, 1.0
    assert [t for t, _ in sampler(top_k=2).distribution(logits)] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}]
)
def test_bad_logits_are_clear_errors(isa, params):
    def draw(*values):
        logits = np.full(200, -1.0, np.float32)
        logits[: len(values)] = values
        return sampler(**params).sample(logits)

    with pytest.raises(RuntimeError, match="logits have NaN"):
        draw(1.0, NAN)
    with pytest.raises(RuntimeError, match="logits have inf"):
        draw(1.0, INF)
    with pytest.raises(RuntimeError, match="every logit is -inf"):
        sampler(**params).sample(np.full(200, -INF, np.float32))
    only = np.full(200, -INF, np.float32)
    only[150] = -1e30
    assert sampler(**params).sample(only)[0] == 150


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", NAN),
        ("temperature", 1e-9),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ]
    + [("top_p", NAN), ("min_p", -0.1), ("min_p", 2.0), ("top_k", -1), ("repetition_penalty", 0.0)]
    + [("presence_penalty", INF), ("frequency_penalty", NAN), ("logprobs", -2), ("logprobs", 101)],
)
def test_invalid_parameters_are_named(field, value):
    with pytest.raises(ValueError, match=rf"\[sampling\] {field} is "):
        _C.SamplingParams(**{field: value}).validate(100)


@pytest.mark.parametrize("bias", [(100, 1.0), (-1, 1.0), (5, NAN), (5, INF)])
def test_invalid_bias_is_named(bias):
    with pytest.raises(ValueError, match=r"\[sampling\] logit_bias"):
        _C.SamplingParams(logit_bias=[bias]).validate(100)


def test_defaults_and_extremes_are_valid():
    _C.SamplingParams().validate(100)
    _C.SamplingParams(
        temperature=0.0, top_p=1e-6, min_p=1.0, top_k=10**9, logit_bias=[(99, -INF)], logprobs=100
    ).validate(100)
