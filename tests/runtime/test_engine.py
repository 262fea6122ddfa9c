"""csrc/runtime/engine.cpp: speculation changes nothing but the number of steps; a request whose
logits are not usable ends alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from model.tiny import make_checkpoint
from safetensors.torch import load_file, save_file

from qwen_native import _C, LLM

LOOP = [5, 6, 7, 8, 9, 10, 11, 12] * 6
DRAWN = {"temperature": 0.8, "top_p": 0.9, "seed": 3}


def run(llm, requests, *, speculate, **options):
    """All tokens with their log-probabilities and finish reasons, by (request, index); steps."""
    engine = _C.Engine(
        llm.model,
        threads=options.pop("threads", 2),
        context=options.pop("context", 256),
        cache_tokens=options.pop("cache_tokens", 4096),
        kv_dtype=llm.kv_dtype,
        max_step_tokens=options.pop("max_step_tokens", 512),
    )
    for prompt, sampling, limits in requests:
        params = _C.SamplingParams(**{"logprobs": 2, **sampling})
        limits = {"max_new_tokens": 60, "stop_ids": [], **limits}
        engine.add(prompt, params, speculate=speculate, **limits)
    out, steps = {}, 0
    while engine.has_work:
        steps += 1
        for request, index, *token in engine.step():
            out.setdefault((request, index), []).append(tuple(token))
    return out, steps


def assert_same(llm, requests, *, fewer_steps=True, **options):
    plain, plain_steps = run(llm, requests, speculate=False, **options)
    drafted, steps = run(llm, requests, speculate=True, **options)
    assert drafted == plain
    assert all(tokens[-1][3] is not None for tokens in plain.values())
    assert not fewer_steps or steps < plain_steps, (steps, plain_steps)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One checkpoint in all formats; its greedy output runs into loops."""
    folder = tmp_path_factory.mktemp("loops")
    make_checkpoint(folder, "qwen3", dtype=torch.bfloat16)
    return {weights: LLM(folder, weights=weights) for weights in ("f32", "bf16", "int8", "int4")}


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
def test_greedy_output_is_that_of_plain_decoding(models, isa, weights):
    fewer = isa != "scalar"  # where another row costs as much as a step, nothing is drafted
    greedy = {"temperature": 0.0}
    assert_same(models[weights], [(LOOP, greedy, {"max_new_tokens": 150})], fewer_steps=fewer)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.5, "seed": 1},
        {"temperature": 0.3, "top_k": 5, "seed": 2, "logprobs": -1},
        {"temperature": 0.7, "top_p": 0.8, "min_p": 0.01, "seed": 2**63},
        {"temperature": 0.2, "frequency_penalty": 0.05, "presence_penalty": 0.1, "logprobs": 0},
        {"temperature": 0.0, "repetition_penalty": 1.02},
        {"temperature": 0.4, "logit_bias": [(7, 9.0), (8, 8.5), (9, -float("inf"))]},
    ],
)
def test_sampled_output_is_the_same_draw(models, weights, sampling):
    assert_same(models[weights], [(LOOP, sampling, {})], fewer_steps=False)


def test_drafts_are_accepted_when_sampling(models):
    forced = {"temperature": 0.6, "logit_bias": [(7, 25.0)], "seed": 4}
    assert_same(models["int4"], [(LOOP, forced, {})])
    _, steps = run(models["int4"], [(LOOP, forced, {})], speculate=True)
    assert steps < 30  # for 60 tokens


def test_batches_with_prompts_forks_and_preemption(models):
    requests = [
        (LOOP, {"temperature": 0.0}, {}),
        (list(range(3, 90)), DRAWN, {"n": 3, "max_new_tokens": 40}),
        ([9], {"temperature": 0.0}, {"max_new_tokens": 100}),
        (LOOP[3:] + list(range(20, 60)), {"temperature": 0.0}, {}),
    ]
    for options in (
        {},
        {"max_step_tokens": 5},
        {"cache_tokens": 256, "context": 200},
        {"threads": 1, "max_step_tokens": 33},
    ):
        assert_same(models["int8"], requests, **options, fewer_steps=False)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 59])
def test_limits_end_the_output_where_they_did(models, count):
    greedy = {"temperature": 0.0}
    llm = models["int4"]
    plain, _ = run(llm, [(LOOP, greedy, {})], speculate=False)
    tokens = [token for token, *_ in plain[0, 0]]
    requests = [
        (LOOP, greedy, {"max_new_tokens": count}),
        (LOOP, greedy, {"stop_ids": [tokens[count]]}),
    ]
    for request in requests:
        assert_same(llm, [request], fewer_steps=False)
        assert_same(llm, [request], context=len(LOOP) + count + 1, fewer_steps=False)


def test_llm_option(models, tmp_path):
    make_checkpoint(tmp_path, "qwen2")
    options = {"max_new_tokens": 80, "ignore_eos": True}
    outs = []
    for speculation in ("prompt_lookup", "off"):
        llm = LLM(tmp_path, weights="int4", speculation=speculation)
        outs.append([llm.generate(LOOP, temperature=t, seed=1, **options) for t in (0.0, 0.7)])
    for a, b in zip(*outs, strict=True):
        assert a.token_ids == b.token_ids
    with pytest.raises(ValueError, match="speculation is 'on', expected one of prompt_lookup, off"):
        LLM(tmp_path, speculation="on")


def test_bad_logits_end_only_their_request(tmp_path):
    """The embedding of one token is NaN: whoever has it in its prompt has NaN logits."""
    make_checkpoint(tmp_path, "qwen2", tie=False)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["model.embed_tokens.weight"][50] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    llm = LLM(tmp_path, weights="f32")
    greedy = {"temperature": 0.0, "logprobs": -1, "logit_bias": [(50, -float("inf"))]}
    requests = [([3, 4], greedy, {}), ([3, 50], greedy, {"n": 2}), ([6, 7, 8], greedy, {})]
    for speculate in (False, True):
        out, _ = run(llm, requests, speculate=speculate)
        alone, _ = run(llm, requests[:1], speculate=False)
        assert out[0, 0] == alone[0, 0]
        assert len(out[2, 0]) == 60
        for index in (0, 1):
            [(_, _, _, finish, error, _)] = out[1, index]
            assert finish == "error" and "logits have NaN" in error
    with pytest.raises(RuntimeError, match="logits have NaN"):
        llm.generate([3, 50], max_new_tokens=2)
    good = llm.generate([3, 4], max_new_tokens=2, temperature=0.0)
    assert len(good.token_ids) == 2
    assert np.isfinite(llm.score([3, 4, *good.token_ids])).all()
