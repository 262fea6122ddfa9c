"""qwen_native/token_table.py: the same tokens as tiktoken's, from flat arrays."""

from __future__ import annotations

import functools
import sys
import unicodedata

import numpy as np
import pytest
from demo_model import demo_metadata
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_native.errors import CheckpointError
from qwen_native.token_table import MAX_SHORT, Overlay, TokenTable, encode_short
from qwen_native.tokenizer import SPLIT_PATTERN, AddedToken, Tokenizer


@functools.cache
def demo() -> Tokenizer:
    return Tokenizer.from_gguf(demo_metadata())


@functools.cache
def demo_table() -> TokenTable:
    return demo().table()


def small(ranks: bool) -> TokenTable:
    """All bytes and three merges; with ranks the ids are in another order."""
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"abc", b"bc"]
    order = list(range(len(tokens)))
    if ranks:
        order = order[::-1]
    by_id = [tokens[i] for i in order]
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    rank_to_id = [order.index(rank) for rank in range(len(tokens))] if ranks else None
    return TokenTable.build(by_id, rank_of, rank_to_id)


def test_demo_tokens_are_those_of_the_source():
    table = demo_table()
    assert len(table) == demo().vocab_size
    assert table[:300] == list(demo()._plain[:300])
    assert table.rank_dict() == demo()._ranks
    assert table.rank_to_id() is None
    for token in (b"Hello", b" world", b"\xff", "你好".encode(), b"no such token"):
        assert table.find(token) == demo()._ranks.get(token)


@pytest.mark.parametrize("ranks", [False, True])
def test_ranks_that_are_not_ids(ranks):
    table = small(ranks)
    ids = {table[i]: i for i in range(len(table))}
    # "ab" merges before "bc", though "bc" is a token.
    assert encode_short(table, "xabcx") == [ids[b"xabcx"[:1]], ids[b"abc"], ids[b"x"]]
    assert encode_short(table, "bcbc") == [ids[b"bc"], ids[b"bc"]]
    again = Tokenizer.from_table(table, [], len(table))
    expected = [
        again._rank_to_id[i] if ranks else i for i in again._encoding.encode_ordinary("abcbcab")
    ]
    assert encode_short(table, "abcbcab") == expected


TEXT = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from(
            "abcdefgsStTrReEvVmMlLdD'\u2019 \t\n\r\x0b\x1c\x85\xa0\u2003\u3000"
            "ſK0१½你好é́👍🏽.,;!?-_()"
        ),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(TEXT)
@example("I'LL we'Re 'ſ 'S it'd\r\n\r\n  x")
@example("   \n\n  a  \t b\u00a0\u00a0c\u2003 \u3000\n d   ")
@example("def f(x):\n\treturn x ** 2  # 你好, мир! ١٢٣ ½ ²\r\n")
@example("\x1c\x1d a\x1e \x1f")
def test_short_text_is_encoded_as_tiktoken_does(text):
    text = unicodedata.normalize("NFC", text)
    ids = encode_short(demo_table(), text)
    if ids is None:
        assert any(unicodedata.category(char) == "Cn" for char in text)
    else:
        assert ids == demo()._encoding.encode_ordinary(text)


def test_every_assigned_character_is_split_as_tiktoken_does():
    """Letters, numbers, spaces and the rest, each between letters and between punctuation."""
    chars = [
        chr(code)
        for code in range(sys.maxunicode + 1)
        # of the CJK and Hangul blocks, all alike, every 50th
        if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")
        and (not (0x3400 <= code < 0xD7A4 or 0x17000 <= code < 0x32000) or code % 50 == 0)
    ]
    for begin in range(0, len(chars), 500):
        text = "".join(f"x{char}'{char}s {char}." for char in chars[begin : begin + 500])
        expected = demo()._encoding.encode_ordinary(text)
        actual = []
        for part in range(0, len(text), MAX_SHORT // 9 * 9):
            ids = encode_short(demo_table(), text[part : part + MAX_SHORT // 9 * 9])
            assert ids is not None
            actual += ids
        assert actual == expected


@pytest.mark.parametrize(
    "text", ["a" * (MAX_SHORT + 1), "q" * 200, "x\u0378", "\U000e0fff"], ids=lambda t: t[:3]
)
def test_other_text_is_left_to_tiktoken(text):
    assert encode_short(demo_table(), text) is None
    tokenizer = Tokenizer.from_table(demo_table(), demo().added, demo().vocab_size)
    assert tokenizer.encode(text) == demo().encode(text)


def test_tokenizer_from_table_equals_its_source():
    tokenizer = Tokenizer.from_table(demo_table(), demo().added, demo().vocab_size)
    text = "Hi <|im_start|>there<think>, 你好\n"
    for encode in ("encode", "encode_with_special"):
        ids = getattr(demo(), encode)(text)
        assert getattr(tokenizer, encode)(text) == ids
        assert tokenizer.decode(ids) == demo().decode(ids)
        assert tokenizer.decode(ids, skip_special=False) == demo().decode(ids, skip_special=False)
    assert tokenizer.special_tokens == demo().special_tokens
    assert tokenizer.vocab_size == demo().vocab_size
    assert list(tokenizer._bytes) == list(demo()._bytes)
    assert list(tokenizer._visible_bytes) == list(demo()._visible_bytes)
    assert tokenizer.table() is demo_table()


def test_overlay_and_table_are_sequences():
    overlay = Overlay([b"a", b"b"], {1: b"X", 3: b"Y"}, 4)
    assert list(overlay) == [b"a", b"X", b"", b"Y"]
    assert overlay[1:3] == [b"X", b""]
    for sequence in (overlay, small(False)):
        for index in (-1, len(sequence)):
            with pytest.raises(IndexError):
                sequence[index]


def damaged(name: str, change) -> dict[str, np.ndarray]:
    table = small(True)
    parts = {n: getattr(table, n).copy() for n in ("texts", "offsets", "order", "ranks")}
    parts[name] = change(parts[name])
    return parts


def set_entry(index: int, value: int):
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("texts", lambda a: a[:-1]),
        ("offsets", lambda a: a[:0]),
        ("offsets", set_entry(0, 1)),
        ("offsets", set_entry(7, 1 << 30)),
        ("offsets", set_entry(-1, 5)),
        ("order", set_entry(3, 1 << 31)),
        ("order", lambda a: a[:100]),
        ("order", lambda a: np.concatenate([a, a[:1]])),
        ("ranks", lambda a: a[1:]),
        ("ranks", set_entry(9, 0xFFFFFFFF)),
        ("ranks", lambda a: np.zeros_like(a)),
    ],
)
def test_damaged_arrays_are_refused(name, change):
    with pytest.raises(CheckpointError):
        TokenTable(**damaged(name, change))


@pytest.mark.parametrize(
    ("added", "size"),
    [
        ([AddedToken(3, "<x>", True)], 259),  # id of an ordinary token
        ([AddedToken(259, "<x>", True)], 259),
        ([AddedToken(259, "<x>", True), AddedToken(259, "<y>", True)], 300),
        ([], 10),
    ],
)
def test_added_tokens_need_ids_of_their_own(added, size):
    with pytest.raises(CheckpointError):
        Tokenizer.from_table(small(False), added, size)


def test_split_pattern_is_the_one_that_was_translated():
    assert SPLIT_PATTERN.count("|") == 12  # `_SPLIT` has to follow when it changes
