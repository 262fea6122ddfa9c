"""qwen_native/bench.py: the cases it runs and what it reports of them."""

from __future__ import annotations

import pytest
from model.tiny import make_checkpoint

from qwen_native import LLM
from qwen_native.bench import Benchmark


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder, "qwen2")
    return LLM(folder, weights="int8")


def test_every_case_is_measured_and_leaves_nothing_behind(llm):
    benchmark = Benchmark(llm, repeats=2)
    seen = []
    measurements = benchmark.run([5, 40], 4, [0, 30], [1, 3], seen.append)
    assert seen == measurements
    cases = [(m.kind, m.tokens, m.depth, m.batch) for m in measurements]
    assert cases == [
        ("prefill", 5, 0, 1),
        ("prefill", 40, 0, 1),
        ("decode", 4, 0, 1),
        ("decode", 4, 0, 3),
        ("decode", 4, 30, 1),
        ("decode", 4, 30, 3),
    ]
    for m in measurements:
        assert m.tokens_per_second > 0
        assert m.spread >= 0
        assert m.bandwidth_share > 0 and m.peak_share > 0
        assert set(m.to_json()) >= {"kind", "tokens_per_second", "bandwidth_share", "peak_share"}
    assert not llm._engine.has_work


def test_a_case_beyond_the_context_is_an_error(llm):
    with pytest.raises(ValueError, match="expected at most the context of 512"):
        Benchmark(llm, repeats=1).run([600], 0, [], [])


def test_bytes_of_a_pass_leave_out_an_untied_embedding(llm):
    rows, width = llm.config.vocab_size, llm.config.hidden_size
    expected = llm.model.weight_bytes * (
        1 - rows * width / sum(n for n, _ in llm.model.bytes_by_format.values())
    )
    assert Benchmark(llm, 1).weight_bytes() == pytest.approx(expected, rel=0.02)
