"""tokenizer.json files as the `tokenizers` library and the package read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from qwen_native.token_files import byte_tokenizer_json, tokenizer_json_from_gguf
from qwen_native.tokenizer import Tokenizer, gpt2_alphabet

TEXT = "def f(x):\n    return 'héllo' + \"世界\" 2048\t<|im_end|> e\u0301"


def read_both(folder: Path, content: dict[str, Any]) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    ours = Tokenizer.from_folder(folder)
    assert ours is not None
    return ours, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_bytes(tmp_path):
    ours, theirs = read_both(tmp_path, byte_tokenizer_json())
    ids = ours.encode_with_special(TEXT)
    assert ids == theirs.encode(TEXT).ids
    plain = TEXT.replace("e\u0301", "é").encode()
    assert ours.encode(TEXT) == list(plain)
    assert 257 + 1 in ids and (ours.eod, ours.im_start, ours.im_end) == (256, 257, 258)
    assert theirs.decode(ids, skip_special_tokens=False) == plain.decode()


def test_gguf_vocabulary_with_merges_and_unused_ids(tmp_path):
    letters = gpt2_alphabet()
    tokens = [*sorted(letters), "re", "ret", "[PAD258]", "<think>", "<|endoftext|>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [token.encode() for token in tokens],
        "tokenizer.ggml.token_type": np.array([1] * 258 + [5, 4, 3], dtype=np.int32),
        "tokenizer.ggml.merges": ["r e", "re t"],
    }
    ours, theirs = read_both(tmp_path, tokenizer_json_from_gguf(metadata))
    text = TEXT + "<think>ret<|endoftext|>"
    expected = Tokenizer.from_gguf(metadata).encode_with_special(text)
    assert ours.encode_with_special(text) == expected == theirs.encode(text).ids
    assert {257, 259, 260} < set(expected)
