"""Packing and batching."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from train.tiny import byte_tokenizer

from qwen_native.train.data import IGNORE, Batch, PackedText, Sample, micro_batches
from qwen_native.train.records import Report
from qwen_native.train.shards import write_shards

EOD = 256


def packed(folder, texts, **options) -> PackedText:
    tokenizer = byte_tokenizer(folder / "tokenizer")
    named = [("test", text) for text in texts]
    shards = write_shards(folder / "shards", named, tokenizer, Report())
    return PackedText(shards, **({"context": 16, "batch_size": 3, "seed": 5} | options))


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="ascii"), min_size=1, max_size=30), min_size=1),
    context=st.integers(1, 20),
    cross=st.booleans(),
)
def test_each_sequence_is_a_run_of_the_stream(tmp_path_factory, texts, context, cross):
    source = packed(tmp_path_factory.mktemp("x"), texts, context=context, cross_documents=cross)
    count = source.stream.shards.tokens // context
    if count == 0:
        return
    samples = [source.sample(i) for i in range(count)]
    stream = [t for p in source.stream.read(0, count * context + 1) for t in p.tokens.tolist()]
    runs = sorted(tuple(s.tokens.tolist()) for s in samples)
    assert runs == sorted(tuple(stream[i * context : (i + 1) * context]) for i in range(count))
    for sample in samples:
        assert len(sample.tokens) == len(sample.targets) == sum(sample.lengths) == context
        after_end = sample.tokens == EOD
        counts = sample.targets != IGNORE
        # Only what follows the end of a document is no target.
        assert (counts == (np.ones(context, dtype=bool) if cross else ~after_end)).all()
        inner = counts[:-1]
        assert (sample.targets[:-1][inner] == sample.tokens[1:][inner]).all()
        if cross:
            assert sample.lengths == (context,)
        else:
            ends = np.cumsum(sample.lengths) - 1
            assert set(np.flatnonzero(after_end)) | {context - 1} == set(ends)


def test_validation_is_every_document_once_and_complete(tmp_path):
    texts = ["hello there", "a", "general kenobi"]
    source = packed(tmp_path, texts)
    held_out = PackedText(source.stream.shards, 16, 3, seed=5, validation=source.stream.shards)
    samples = list(held_out.validation())
    assert sum(sample.counted for sample in samples) == sum(len(t) for t in texts)
    assert not list(source.validation())


def test_batch_lays_documents_side_by_side():
    samples = [
        Sample(np.arange(5), np.arange(5) + 1, (2, 3)),
        Sample(np.arange(4), np.arange(4) + 1, (4,)),
    ]
    batch = Batch.of(samples)
    assert batch.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 9]
    assert batch.tokens.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    limit=st.integers(1, 64),
    world=st.integers(1, 4),
)
def test_micro_batches_hold_every_sample_once_within_the_limit(lengths, limit, world):
    samples = [Sample(np.full(n, i), np.full(n, i), (n,)) for i, n in enumerate(lengths)]
    shares = micro_batches(samples, limit, world)
    assert len(shares) == world
    assert len({len(groups) for groups in shares}) == 1
    everything = [s.tokens[0] for groups in shares for group in groups for s in group]
    assert sorted(everything) == list(range(len(lengths)))
    for group in (group for groups in shares for group in groups):
        assert len(group) <= 1 or sum(len(s.tokens) for s in group) <= limit


def test_a_step_is_the_same_whenever_it_is_asked_for(tmp_path):
    source = packed(tmp_path, [f"document {i}" for i in range(40)])
    later = [s.tokens.tolist() for s in source.step(11)]
    source.step(3)
    assert [s.tokens.tolist() for s in source.step(11)] == later
    assert later != [s.tokens.tolist() for s in source.step(10)]
