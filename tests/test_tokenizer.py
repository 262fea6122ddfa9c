"""Tokenizer: test vectors, the `tokenizers` library as independent truth, hostile files."""

from __future__ import annotations

import base64
import collections
import functools
import hashlib
import json
import random
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from demo_model import demo_metadata, demo_path
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_native.errors import CheckpointError
from qwen_native.gguf import read_gguf
from qwen_native.tokenizer import (
    SPLIT_PATTERN,
    AddedToken,
    Tokenizer,
    _marks_in_order,
    read_added_tokens,
)

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"

# Computed with tiktoken from the original qwen.tiktoken (qwen_facts §2.4).
VECTORS = [
    ("Hello world", [9707, 1879]),
    (" Hello world", [21927, 1879]),
    ("2048", [17, 15, 19, 23]),
    (" 2048", [220, 17, 15, 19, 23]),
    ("你好，世界", [108386, 3837, 99489]),
    ("我是一只猫", [35946, 99639, 91680, 100472]),
    ("system", [8948]),
    ("user", [872]),
    ("assistant", [77091]),
    ("\n", [198]),
    ("\n\n", [271]),
    (" A", [362]),
    ("Observation:", [37763, 367, 25]),
    ("Observation:\n", [37763, 367, 510]),
    ('print("<|endoftext|>")', [1350, 9639, 91, 8691, 723, 427, 91, 82598]),
    ("I'm DON'T we'LL", [40, 2776, 44273, 17323, 582, 6, 4086]),
    ("  x\n\n  y\t\tz ", [220, 856, 271, 220, 379, 197, 20832, 220]),
    ("½ ①٣", [26062, 220, 48312, 254, 149, 96]),
    ("🙂" + FAMILY, [145080, 145367, 378, 235, 145233, 378, 235, 145665]),
    (
        "<|im_start|>user\nhi<|im_end|>\n",
        [27, 91, 318, 4906, 91, 29, 872, 198, 6023, 27, 91, 318, 6213, 91, 397],
    ),
    ("def f(x):\n    return x+1\n", [750, 282, 2075, 982, 262, 470, 856, 10, 16, 198]),
]
SPECIAL_VECTORS = [
    ('print("<|endoftext|>")', [1350, 445, 151643, 899]),
    ("<|im_start|>user\nhi<|im_end|>\n", [151644, 872, 198, 6023, 151645, 198]),
]

PIECES = ["<|im_start|>", "<|im_end|>", "<think>", "<tool_call>", "'s", "'LL", "\r\n", "\n", "\t"]
PIECES += [" ", "  ", "\u3000", "\xa0", "e\u0301", "\u0323\u0301", "가", "각", "A", "1", "٣"]
PIECES += ["½", "!", "🙂"]
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


@functools.cache
def demo() -> Tokenizer:
    return Tokenizer.from_gguf(demo_metadata())


def demo_parts() -> tuple[list[str], list[int], list[str]]:
    metadata = demo_metadata()
    return tuple(metadata["tokenizer.ggml." + key] for key in ("tokens", "token_type", "merges"))


@functools.cache
def hf_demo() -> tokenizers.Tokenizer:
    """The demo model's tokenizer, built from vocabulary and merges by the `tokenizers` library."""
    tokens, types, merges = demo_parts()
    vocab = {token: i for i, token in enumerate(tokens) if types[i] == 1}
    model = tokenizers.models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(tokens[i], special=types[i] == 3, normalized=False)
            for i in range(len(tokens))
            if types[i] in (3, 4)
        ]
    )
    return tokenizer


def byte_alphabet() -> dict[int, str]:
    """GPT-2's table, from the `tokenizers` library's own alphabet."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    assert set(table.values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return table


SMALL_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ"]


def small_tokens() -> list[str]:
    return [*byte_alphabet().values(), *(merge.replace(" ", "") for merge in SMALL_MERGES)]


def small_gguf() -> dict[str, object]:
    tokens = [*small_tokens(), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "[PAD265]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 261 + [3, 3, 3, 4, 5],
        "tokenizer.ggml.merges": list(SMALL_MERGES),
    }


def small_folder(folder: Path, order: Callable[[int], int] = lambda i: i) -> Path:
    vocab = {token: order(i) for i, token in enumerate(small_tokens())}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(SMALL_MERGES) + "\n")
    added = {"<|endoftext|>": 261, "<|im_start|>": 262, "<|im_end|>": 263, "<think>": 264}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def small_json() -> dict[str, object]:
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    split["pattern"] = {"Regex": SPLIT_PATTERN}
    return {
        "added_tokens": [{"id": 261, "content": "<|im_end|>", "special": True}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(small_tokens())},
            "merges": [merge.split(" ") for merge in SMALL_MERGES],
        },
    }


class TestDemoVocabulary:
    @pytest.mark.parametrize(("text", "ids"), VECTORS)
    def test_vector(self, text: str, ids: list[int]) -> None:
        assert demo().encode(text) == ids
        assert demo().decode(ids) == text

    @pytest.mark.parametrize(("text", "ids"), SPECIAL_VECTORS)
    def test_vector_with_special_tokens(self, text: str, ids: list[int]) -> None:
        assert demo().encode_with_special(text) == ids
        assert demo().decode(ids, skip_special=False) == text

    def test_named_ids(self) -> None:
        tokenizer = demo()
        assert (tokenizer.eod, tokenizer.im_start, tokenizer.im_end) == (151643, 151644, 151645)
        assert tokenizer.eos_ids == (151645, 151643)
        assert tokenizer.vocab_size == 151936
        assert tokenizer.special_tokens["<tool_call>"] == 151657
        assert len(tokenizer.special_tokens) == 22

    def test_equals_the_original_qwen_file(self, tmp_path: Path) -> None:
        """Ids 0 … 151642 written in the form of qwen.tiktoken are that file, byte for byte."""
        tokenizer = demo()
        lines = [base64.b64encode(tokenizer.token_bytes(i)) + b" %d\n" % i for i in range(151643)]
        digest = hashlib.sha256(b"".join(lines)).hexdigest()
        assert digest == "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
        (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
        qwen1 = Tokenizer.from_folder(tmp_path)
        assert qwen1 is not None
        assert qwen1.vocab_size == 151851
        assert qwen1.special_tokens["<|extra_0|>"] == 151646
        assert qwen1.special_tokens["<|extra_204|>"] == 151850
        for text, ids in VECTORS:
            assert qwen1.encode(text) == ids
        for text, ids in SPECIAL_VECTORS:
            assert qwen1.encode_with_special(text) == ids

    def test_all_four_sources_agree(self, tmp_path: Path) -> None:
        hf_demo().save(str(tmp_path / "tokenizer.json"))
        from_json = Tokenizer.from_folder(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
        hf_demo().model.save(str(tmp_path))
        _, types, _ = demo_parts()
        decoder = {
            str(i): {"content": content, "special": types[i] == 3}
            for content, i in demo().special_tokens.items()
        }
        config = {"added_tokens_decoder": decoder}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        from_merges = Tokenizer.from_folder(tmp_path)
        for other in (from_json, from_merges):
            assert other is not None
            assert other.special_tokens == demo().special_tokens
            assert other.vocab_size == 151665
            assert other._bytes == demo()._bytes[:151665]
            assert other._visible_bytes == demo()._visible_bytes[:151665]
            assert other._ranks == demo()._ranks
            assert other._rank_to_id is None

    def test_metadata_of_our_own_reader(self) -> None:
        metadata, _, _ = read_gguf(demo_path())
        other = Tokenizer.from_gguf(metadata)
        assert other._bytes == demo()._bytes
        assert other._ranks == demo()._ranks
        assert other.special_tokens == demo().special_tokens

    def test_lazy_merges_and_byte_tokens(self) -> None:
        metadata = dict(demo_metadata())
        tokens, _, merges = demo_parts()
        metadata["tokenizer.ggml.tokens"] = [token.encode() for token in tokens]
        metadata["tokenizer.ggml.merges"] = collections.UserList(merges)
        other = Tokenizer.from_gguf(metadata)
        assert other._bytes == demo()._bytes
        assert other._ranks == demo()._ranks
        assert other._rank_to_id is None

    @given(texts)
    @settings(max_examples=300, deadline=None)
    def test_equals_the_tokenizers_library(self, text: str) -> None:
        library = hf_demo().encode(text, add_special_tokens=False).ids
        assert demo().encode_with_special(text) == library
        assert demo().decode(library) == hf_demo().decode(library)
        assert demo().decode(library, False) == hf_demo().decode(library, skip_special_tokens=False)

    @given(texts)
    @settings(max_examples=300, deadline=None)
    def test_round_trip_without_special_ids(self, text: str) -> None:
        ids = demo().encode(text)
        assert demo().decode(ids) == unicodedata.normalize("NFC", text)
        assert not set(ids) & set(demo().special_tokens.values())

    @given(st.lists(st.integers(0, 151_950)), st.booleans())
    @settings(max_examples=300, deadline=None)
    def test_stream_equals_decode(self, ids: list[int], skip_special: bool) -> None:
        stream = demo().stream_decoder(skip_special)
        parts = [stream.push(index) for index in ids]
        assert "".join(parts) + stream.finish() == demo().decode(ids, skip_special)

    @given(st.lists(st.integers(0, 255)))
    @settings(max_examples=300, deadline=None)
    def test_stream_of_single_bytes_equals_decode(self, ids: list[int]) -> None:
        stream = demo().stream_decoder()
        assert "".join(map(stream.push, ids)) + stream.finish() == demo().decode(ids)

    def test_stream_never_shows_half_a_character(self) -> None:
        text = "🙂 naïve 各" + FAMILY
        stream = demo().stream_decoder()
        shown = ""
        for index in [
            i for byte in text.encode() for i in demo()._encoding._encode_bytes(bytes([byte]))
        ]:
            shown += stream.push(index)
            assert text.startswith(shown)
        assert shown == text
        assert stream.finish() == ""

    def test_ids_without_token(self) -> None:
        tokenizer = demo()
        assert tokenizer.decode([9707, 151_800, 999_999, 1879]) == "Hello world"
        assert tokenizer.stream_decoder().push(999_999) == ""
        for index in (151_800, 999_999):
            with pytest.raises(ValueError, match=f"id {index} has no token"):
                tokenizer.token_bytes(index)
        for call in (tokenizer.token_bytes, lambda i: tokenizer.decode([i])):
            with pytest.raises(ValueError, match="-1 is negative"):
                call(-1)

    def test_markup_stays_visible_and_control_tokens_do_not(self) -> None:
        ids = [151657, 9707, 151658, 151645]
        assert demo().decode(ids) == "<tool_call>Hello</tool_call>"
        assert demo().decode(ids, skip_special=False).endswith("<|im_end|>")

    def test_decode_errors(self) -> None:
        broken = [*demo()._encoding._encode_bytes(b"\xf0\x9f"), 9707]
        assert demo().decode(broken) == "\ufffdHello"
        assert demo().decode(broken, errors="ignore") == "Hello"
        with pytest.raises(UnicodeDecodeError):
            demo().decode(broken, errors="strict")

    @pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "é\udc80"])
    def test_lone_surrogate(self, text: str) -> None:
        with pytest.raises(ValueError, match="lone surrogate U\\+D[89A-F]"):
            demo().encode(text)

    def test_no_text(self) -> None:
        assert demo().encode("") == []
        assert demo().encode_with_special("") == []
        assert demo().decode([]) == ""
        with pytest.raises(TypeError, match="text is bytes"):
            demo().encode(b"abc")  # type: ignore[arg-type]

    def test_builds_fast(self) -> None:
        """Far above what it takes (0.35 s), as other work may run beside the tests."""
        start = time.process_time()
        Tokenizer.from_gguf(demo_metadata()).encode("Hello")
        assert time.process_time() - start < 1.5


class TestLongInput:
    """What makes tiktoken panic or Python slow; compared with tiktoken where that works."""

    @pytest.mark.parametrize("char", ["a", "!", " ", "\n", "é", "各", "\u0301", "ab"])
    def test_a_million_equal_characters(self, char: str) -> None:
        text = char * 1_000_001
        start = time.process_time()
        ids = demo().encode(text)
        assert time.process_time() - start < 20
        assert demo().decode(ids) == unicodedata.normalize("NFC", text)

    @pytest.mark.parametrize("before", ["", "x", "!", "1", "é", "各。", "'"])
    @pytest.mark.parametrize("after", ["", "x", " x", "!", "1", "é"])
    def test_cut_whitespace_runs_equal_tiktoken(
        self, before: str, after: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a low limit, runs are cut that tiktoken can split itself."""
        monkeypatch.setattr("qwen_native.tokenizer._LONG_WHITESPACE", 4)
        encoding = demo()._encoding
        generator = random.Random(before + after)
        for pool in ("\t \u3000\n", " ", "\n", "\r\n", " \n", "\t\xa0"):
            for _ in range(40):
                run = "".join(generator.choices(pool, k=generator.randint(1, 12)))
                text = before + run + after
                assert demo().encode(text) == encoding.encode_ordinary(text), repr(text)

    @given(st.text(alphabet="a1!' \t\n\r\u3000\u0301é", max_size=60))
    @settings(max_examples=500, deadline=None)
    def test_cut_random_text_equals_tiktoken(self, text: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qwen_native.tokenizer._LONG_WHITESPACE", 2)
            expected = demo()._encoding.encode_ordinary(unicodedata.normalize("NFC", text))
            assert demo().encode(text) == expected

    @pytest.mark.parametrize("whitespace", [" ", "\n ", " \n", "\t"])
    def test_two_million_whitespace_characters(self, whitespace: str) -> None:
        text = "a " + whitespace * (2_000_000 // len(whitespace)) + "b c"
        ids = demo().encode(text)
        assert demo().decode(ids) == text
        assert ids[-1:] == demo().encode(" c")

    def test_many_combining_marks(self) -> None:
        """Marks in no canonical order; `unicodedata` alone would take half an hour."""
        marks = "\u0301\u0323\u0f73\u0f71"
        small = "a" + marks * 300 + "b"
        assert demo().decode(demo().encode(small)) == unicodedata.normalize("NFC", small)
        start = time.process_time()
        ids = demo().encode("a" + marks * 250_000)
        assert time.process_time() - start < 20
        assert len(demo().decode(ids)) > 1_000_000

    @given(st.text(alphabet="ae\u0301\u0323\u0f73\u0344가\u11a8", max_size=80))
    @settings(max_examples=300, deadline=None)
    def test_ordering_marks_changes_nothing(self, text: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qwen_native.tokenizer._MARK_STRIDE", 2)
            ordered = _marks_in_order(text)
        assert unicodedata.normalize("NFC", ordered) == unicodedata.normalize("NFC", text)


class TestSmallVocabulary:
    def test_gguf(self) -> None:
        tokenizer = Tokenizer.from_gguf(small_gguf())
        assert tokenizer.encode("hello") == [259]
        assert tokenizer.encode_with_special("hell<think>") == [258, 264]
        assert tokenizer.vocab_size == 266
        assert tokenizer.decode([264, 263, 265]) == "<think>"

    def test_equals_tiktoken(self) -> None:
        tokenizer = Tokenizer.from_gguf(small_gguf())
        inverse = {char: byte for byte, char in byte_alphabet().items()}
        ranks = {bytes(inverse[c] for c in token): i for i, token in enumerate(small_tokens())}
        truth = tiktoken.Encoding(
            "small", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        for text in ("hello", " hello  hell he", "lllhehello", "naïve 各"):
            assert tokenizer.encode(text) == truth.encode_ordinary(text)

    @pytest.mark.parametrize("seed", range(4))
    def test_ids_in_another_order_than_merges(self, tmp_path: Path, seed: int) -> None:
        """The ids are shuffled: the merges then decide the ranks."""
        plain = Tokenizer.from_gguf(small_gguf())
        order = list(range(261))
        random.Random(seed).shuffle(order)
        shuffled = Tokenizer.from_folder(small_folder(tmp_path, order.__getitem__))
        assert shuffled is not None
        for text in ("hello", " hello  hell he", "lllhehello", "naïve 各\n\n"):
            assert shuffled.encode(text) == [order[i] for i in plain.encode(text)]
            assert shuffled.decode(shuffled.encode(text)) == text

    def test_folder_without_tokenizer(self, tmp_path: Path) -> None:
        assert Tokenizer.from_folder(tmp_path) is None

    def test_tokenizer_json(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        for as_pairs in (True, False):
            root = small_json()
            if not as_pairs:
                root["model"]["merges"] = list(SMALL_MERGES)
            path.write_text(json.dumps(root))
            tokenizer = Tokenizer.from_tokenizer_json(path)
            assert tokenizer.encode("hello") == [259]
            assert tokenizer.im_end == 261
            with pytest.raises(ValueError, match="endoftext"):
                _ = tokenizer.eod
            assert tokenizer.eos_ids == (261,)

    def test_added_tokens_of_both_files(self, tmp_path: Path) -> None:
        decoder = {"261": {"content": "<|endoftext|>", "special": True}}
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"added_tokens_decoder": decoder})
        )
        added = {"<|endoftext|>": 261, "<tool_call>": 262, "<|x|>": 263}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        assert read_added_tokens(tmp_path) == [
            AddedToken(261, "<|endoftext|>", True),
            AddedToken(262, "<tool_call>", False),
            AddedToken(263, "<|x|>", True),
        ]


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


BYTE_LINES = b"".join(line(bytes([byte]), byte) for byte in range(256))


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "byte 0x00 has no token"),
            (BYTE_LINES + b"!!!! 256\n", "line 257: b'!!!!' is not base64"),
            (BYTE_LINES + b"YWI=\n", "line 257: .* expected a base64 token and its rank"),
            (BYTE_LINES + b"YWI= x\n", "expected a base64 token and its rank"),
            (BYTE_LINES + b"YWI= -1\n", "expected a base64 token and its rank"),
            (BYTE_LINES + b"YWI= 99999999999\n", "expected a base64 token and its rank"),
            (BYTE_LINES + "YWI= ²\n".encode(), "expected a base64 token and its rank"),
            (BYTE_LINES + line(b"ab", 255), "rank 255 appears twice"),
            (BYTE_LINES + line(b"ab", 257), "rank 256 is missing"),
            (BYTE_LINES + line(b"a", 256), "ids 97 and 256 are both b'a'"),
            (BYTE_LINES[:-9], "expected|is missing|has no token"),
            (BYTE_LINES.replace(line(b"\x07", 7), line(b"ab", 7)), "byte 0x07 has no token"),
        ],
    )
    def test_tiktoken(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "qwen.tiktoken").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("model", "llama", "tokenizer.ggml.model is 'llama', expected 'gpt2'"),
            ("pre", "llama-bpe", "tokenizer.ggml.pre is 'llama-bpe'"),
            ("tokens", None, "tokens is None"),
            ("tokens", [], "tokens is"),
            ("tokens", "abc", "tokens is 'abc'"),
            ("tokens", ["a", b"b", *small_tokens()[2:], *"vwxyz"], "something else than UTF-8"),
            ("tokens", [b"\xff"] * 266, "something else than UTF-8"),
            ("tokens", ["\ud800"] * 266, "something else than UTF-8"),
            ("tokens", [1] * 266, "something else than UTF-8"),
            ("tokens", ["a"] * 266, "collides|both"),
            ("token_type", None, "token_type is None"),
            ("token_type", [1.5] * 266, "token_type is"),
            ("token_type", [[1]] * 266, "token_type is"),
            ("token_type", [1, [2]], "token_type is"),
            ("token_type", [1] * 265, "has 265 entries"),
            ("token_type", [7] * 266, r"token_type\[0\] is 7"),
            ("token_type", [3] * 266, "no ordinary tokens"),
            ("token_type", [5] * 266, "no ordinary tokens"),
            ("token_type", [5] + [1] * 265, "byte 0x21 has no token"),
            ("merges", 5, "merges is 5"),
            ("merges", ["h e", "nothing"] * 3, "merge 1 is 'nothing'"),
            ("merges", ["h e", "h zz"], "needs 'zz'"),
            ("merges", [3], "merge 0 is 3"),
            ("merges", [b"\xff \xff"], "merge 0 is not UTF-8"),
            ("merges", ["h  e"], "merge 0 is 'h  e'"),
        ],
    )
    def test_gguf(self, key: str, value: object, message: str) -> None:
        metadata = {**small_gguf(), "tokenizer.ggml." + key: value}
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_gguf(metadata)

    def test_gguf_token_outside_the_alphabet(self) -> None:
        for text, message in (
            ("a b", "U\\+0020"),
            ("日本", "U\\+65E5"),
            ("", "empty"),
            ("\n", "line end|U\\+000A"),
        ):
            metadata = small_gguf()
            metadata["tokenizer.ggml.tokens"][260] = text
            with pytest.raises(CheckpointError, match=message):
                Tokenizer.from_gguf(metadata)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("vocab.json", b"{", "not valid JSON"),
            ("vocab.json", b"[1]", "expected a JSON object"),
            ("vocab.json", b"\xff\xfe", "not valid JSON"),
            ("vocab.json", b"[" * 200_000, "not valid JSON"),
            ("vocab.json", b'{"a": 1, "a": 2}', "'a' appears twice"),
            ("vocab.json", b'{"a": -1}', "id -1"),
            ("vocab.json", b'{"a": 1e9}', "id 1000000000.0"),
            ("vocab.json", b'{"a": 99999999999}', "id 99999999999"),
            ("vocab.json", b'{"a": true}', "id True"),
            ("vocab.json", b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
            ("vocab.json", b'{"\\ud800": 0}', "UTF-8|Unicode"),
            ("vocab.json", b'{"a": 0, "b": 0}', "id 0 is both"),
            ("vocab.json", b'{"a": 0, "b": 2}', "id 1 has no token"),
            ("vocab.json", b'{"a": 0}', "0x00 has no token"),
            ("vocab.json", b"{}", "no ordinary tokens"),
            ("merges.txt", b"\xff\xff", "not UTF-8"),
            ("merges.txt", b"h e\nh\n", "merge 1 is 'h'"),
            ("merges.txt", b"q u\n", "needs 'qu'"),
            ("added_tokens.json", b'{"<|x|>": 5}', "id 5 is both"),
            ("added_tokens.json", b'{"": 261}', "is empty"),
            ("added_tokens.json", b'{"a": 261, "b": 261}', "collides"),
            ("added_tokens.json", b'{"\\ud800": 261}', "not valid Unicode"),
            ("added_tokens.json", b'{"a": "261"}', "id '261'"),
            (
                "tokenizer_config.json",
                b'{"added_tokens_decoder": 5}',
                "is 5, expected a JSON object",
            ),
            ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "id 'x'"),
            ("tokenizer_config.json", b'{"added_tokens_decoder": {"261": {}}}', "content None"),
        ],
    )
    def test_hugging_face_files(
        self, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        (small_folder(tmp_path) / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_folder(tmp_path)

    def test_half_a_pair(self, tmp_path: Path) -> None:
        (small_folder(tmp_path) / "merges.txt").unlink()
        with pytest.raises(CheckpointError, match="merges.txt is missing"):
            Tokenizer.from_folder(tmp_path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            Tokenizer.from_tiktoken(tmp_path / "nothing")

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("model",), None, "model is None"),
            (("model", "type"), "Unigram", "model.type is 'Unigram'"),
            (("model", "vocab"), [], "expected a JSON object"),
            (("model", "merges"), None, "merges is None"),
            (("model", "merges"), [["h"]], "merge 0 is"),
            (("model", "merges"), [["h", 5]], "merge 0 is"),
            (("normalizer",), None, "expected NFC"),
            (("pre_tokenizer",), None, "expected Qwen's pattern"),
            (("pre_tokenizer",), {"type": "ByteLevel"}, "expected Qwen's pattern"),
            (("added_tokens",), {}, "expected a list"),
            (("added_tokens",), [5], "expected a JSON object"),
            (("added_tokens",), [{"id": 300, "content": 5}], "content 5"),
            (("added_tokens",), [{"id": 261, "content": "a", "special": "no"}], "special 'no'"),
        ],
    )
    def test_tokenizer_json(
        self, tmp_path: Path, path: tuple[str, ...], value: object, message: str
    ) -> None:
        root = small_json()
        place = root
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(root))
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_folder(tmp_path)

    @given(st.data())
    @settings(max_examples=300, deadline=None)
    def test_damaged_files_give_clean_errors(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        """Cut or overwrite any file anywhere: it works, or says what is wrong."""
        folder = tmp_path_factory.mktemp("damaged")
        if data.draw(st.booleans()):
            (folder / "tokenizer.json").write_text(json.dumps(small_json()))
        elif data.draw(st.booleans()):
            (folder / "qwen.tiktoken").write_bytes(BYTE_LINES + line(b"ab", 256))
        else:
            small_folder(folder)
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=8))
        path.write_bytes(bytes(content))
        try:
            tokenizer = Tokenizer.from_folder(folder)
        except CheckpointError:
            return
        assert tokenizer is not None
        text = "hello <|im_end|> naïve"
        assert tokenizer.decode(tokenizer.encode(text)) == text
