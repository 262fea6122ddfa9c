"""Token shards and the stream of shuffled documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from train.tiny import byte_tokenizer

from qwen_native.train.records import Report
from qwen_native.train.shards import DocumentStream, Shards, write_shards

EOD = 256


def make(folder, texts, shard_tokens=1 << 20) -> Shards:
    tokenizer = byte_tokenizer(folder / "tokenizer")
    named = [("test", text) for text in texts]
    return write_shards(folder / "shards", named, tokenizer, Report(), shard_tokens)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="ascii"), min_size=1, max_size=9), min_size=1),
    shard_tokens=st.integers(1, 40),
    ranges=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), max_size=5),
)
def test_every_epoch_has_every_document_once_in_any_reading(
    tmp_path_factory, texts, shard_tokens, ranges
):
    shards = make(tmp_path_factory.mktemp("x"), texts, shard_tokens)
    assert shards.documents == len(texts)
    stream = DocumentStream(shards, seed=7)
    epochs = []
    for epoch in range(2):
        pieces = stream.read(epoch * shards.tokens, (epoch + 1) * shards.tokens)
        assert all(piece.ends_document for piece in pieces)
        documents = [piece.tokens.tolist() for piece in pieces]
        assert all(document[-1] == EOD for document in documents)
        assert sorted(bytes(d[:-1]).decode() for d in documents) == sorted(texts)
        epochs.append([t for d in documents for t in d])
    whole = np.array([*epochs[0], *epochs[1]])
    for begin, length in ranges:
        begin %= shards.tokens
        end = min(begin + length, 2 * shards.tokens)
        pieces = stream.read(begin, end)
        joined = [t for piece in pieces for t in piece.tokens.tolist()]
        assert joined == whole[begin:end].tolist()


def test_epochs_and_seeds_differ(tmp_path):
    shards = make(tmp_path, [chr(65 + i) * 3 for i in range(26)])

    def order(seed: int, epoch: int) -> list[int]:
        pieces = DocumentStream(shards, seed).read(epoch * 104, (epoch + 1) * 104)
        return [int(piece.tokens[0]) for piece in pieces]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != sorted(order(1, 0))


def test_damaged_and_foreign_shards_are_refused(tmp_path):
    shards = make(tmp_path, ["one", "two"])
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    shards.check_tokenizer(tokenizer)
    shards.meta["tokenizer"] = "other"
    with pytest.raises(ValueError, match="another tokenizer"):
        shards.check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="exists already"):
        write_shards(tmp_path / "shards", [("x", "y")], tokenizer, Report())
    with pytest.raises(ValueError, match="is no folder of token shards"):
        Shards(tmp_path)
    path = tmp_path / "shards" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="damaged"):
        Shards(tmp_path / "shards")


def test_no_documents_leave_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="no document to train on"):
        make(tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_text_that_spells_special_tokens_stays_text(tmp_path):
    shards = make(tmp_path, ["a<|endoftext|>b"])
    assert bytes(shards.read(0, 0, 15).tolist()) == b"a<|endoftext|>b"
    assert shards.tokens == 16
