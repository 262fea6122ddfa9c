"""csrc/model/qwen.cpp against transformers, and the promise of one numerics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model.tiny import logits, make_checkpoint
from tolerance import assert_contraction

from qwen_native import _C, LLM, ops

FORMATS = ("f32", "bf16", "int8", "int4")


def random_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 331, count).tolist()


def check_against(model, folder, ids) -> None:
    """float32 against transformers in float32, judged by its distance from float64."""
    actual = torch.from_numpy(LLM(folder, weights="f32").logits(ids))
    base = logits(model, ids)
    reference = logits(model.double(), ids)
    model.float()
    assert_contraction(actual, reference, base, factor=4.0)  # ~20 ops, each at most twice torch's


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("window", [None, 24])
def test_matches_transformers(tmp_path, architecture, tie, num_kv_heads, yarn, window):
    model = make_checkpoint(
        tmp_path,
        architecture,
        tie=tie,
        num_kv_heads=num_kv_heads,
        yarn=yarn,
        sliding_window=window,
        max_window_layers=1 if window else 3,
    )
    check_against(model, tmp_path, random_ids(150))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_head_dim_is_independent_of_hidden_size(tmp_path, head_dim, isa):
    model = make_checkpoint(tmp_path, "qwen3", num_heads=3, num_kv_heads=1, head_dim=head_dim)
    check_against(model, tmp_path, random_ids(70))


def test_every_level_matches_transformers(tmp_path, isa):
    model = make_checkpoint(tmp_path, "qwen2")
    check_against(model, tmp_path, random_ids(70))


def test_bf16_checkpoint_is_used_in_place(tmp_path):
    model = make_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16)
    llm = LLM(tmp_path)
    assert set(llm.model.bytes_by_format) == {"bf16"}
    ids = random_ids(60)
    actual = torch.from_numpy(llm.logits(ids))
    reference = logits(model.double(), ids)
    base = logits(model.bfloat16(), ids).float()
    assert_contraction(actual, reference, base)


@pytest.mark.parametrize(
    "weights, kv_dtype", [*((weights, "auto") for weights in FORMATS), ("int8", "int8")]
)
def test_results_do_not_depend_on_batch_chunks_or_threads(tmp_path, isa, weights, kv_dtype):
    make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16)
    ids = random_ids(90)
    llm = LLM(tmp_path, weights=weights, kv_dtype=kv_dtype, invariant=True, threads=1)
    whole = llm.logits(ids)

    def engine(threads: int, chunk: int) -> _C.Engine:
        return _C.Engine(
            llm.model,
            threads=threads,
            context=512,
            cache_tokens=4096,
            kv_dtype=llm.kv_dtype,
            max_step_tokens=chunk,
        )

    for threads, chunk in [(1, 1), (1, 7), (2, 33), (2, 512)]:
        assert np.array_equal(engine(threads, chunk).logits(ids, len(ids)), whole), (threads, chunk)

    # Generation in a batch of different lengths reports what score() computes for each alone.
    prompts = [random_ids(n, seed=n) for n in (1, 5, 64, 90)]
    batched = llm.generate(
        prompts, max_new_tokens=12, temperature=0.9, seed=5, logprobs=2, ignore_eos=True
    )
    for prompt, out in zip(prompts, batched, strict=True):
        alone = llm.generate(
            prompt, max_new_tokens=12, temperature=0.9, seed=5, logprobs=2, ignore_eos=True
        )
        assert alone.token_ids == out.token_ids
        assert alone.logprobs == out.logprobs
        scores = llm.score(prompt + out.token_ids)[len(prompt) - 1 :]
        assert np.array_equal(scores, np.array(out.logprobs, dtype=np.float32))


def test_preemption_does_not_change_results(tmp_path):
    """Three sequences of two pages each share a cache of four: some have to start over."""
    make_checkpoint(tmp_path, "qwen2")
    llm = LLM(tmp_path, weights="int8")
    prompts = [random_ids(40, seed=n) for n in range(3)]

    def run(prompts: list[list[int]], cache_tokens: int) -> list[list[int]]:
        engine = _C.Engine(
            llm.model, threads=2, context=128, cache_tokens=cache_tokens, kv_dtype=llm.kv_dtype
        )
        greedy = _C.SamplingParams(temperature=0.0)
        ids = [engine.add(p, greedy, max_new_tokens=60, stop_ids=[]) for p in prompts]
        tokens: dict[int, list[int]] = {i: [] for i in ids}
        while engine.has_work:
            for request, _, token, *_ in engine.step():
                tokens[request].append(token)
        return [tokens[i] for i in ids]

    together = run(prompts, cache_tokens=256)
    assert together == [run([prompt], cache_tokens=1024)[0] for prompt in prompts]
    assert all(len(tokens) == 60 for tokens in together)


def test_quantised_weights_are_wired_like_the_full_ones(tmp_path):
    """Quantisation itself is bounded in test_quantize.py. Logits of an unrelated model would be
    sqrt(2) standard deviations away; 4 bits are about 12 times coarser than 8.
    """
    make_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16)
    ids = random_ids(60)
    full = LLM(tmp_path, weights="f32").logits(ids)
    error = {
        weights: (LLM(tmp_path, weights=weights).logits(ids) - full).std() / full.std()
        for weights in ("int8", "int4")
    }
    assert error["int4"] < 0.8, error
    assert error["int8"] < error["int4"] / 4, error


def test_yarn_and_default_frequencies_differ(tmp_path):
    """The switch does something: a test of both values that could not otherwise fail."""
    ids = random_ids(200)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    make_checkpoint(tmp_path / "a", "qwen2", yarn=False)
    make_checkpoint(tmp_path / "b", "qwen2", yarn=True)
    a, b = (LLM(tmp_path / name, weights="f32").logits(ids) for name in "ab")
    assert np.abs(a - b).max() > 1e-2


def test_missing_and_unknown_levels_are_refused():
    with pytest.raises(ValueError, match="level is 'avx9'"):
        ops.set_isa("avx9")
