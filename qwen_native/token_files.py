"""Writes a vocabulary as the `tokenizer.json` that every implementation reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_native.tokenizer import END_OF_TEXT, IM_END, IM_START, SPLIT_PATTERN, gpt2_alphabet

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "qwen.tiktoken",
)
"""What a checkpoint folder may have of a tokenizer."""

_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF


def tokenizer_json(
    vocabulary: Mapping[str, int],
    merges: Sequence[str],
    added: Sequence[tuple[int, str, bool]],
) -> dict[str, Any]:
    """Describe byte-level BPE after NFC and Qwen's split, as the `tokenizers` library does.

    Args:
        vocabulary: ordinary tokens in GPT-2's alphabet, with their ids.
        merges: "left right" pairs, first merged first.
        added: (id, content, whether it is a control token) of each added token.
    """
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated"}
    bytes_as_letters = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    byte_level = {"type": "ByteLevel", **bytes_as_letters}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": special,
            }
            for index, content, special in added
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(vocabulary),
            "merges": list(merges),
        },
    }


def tokenizer_json_from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The `tokenizer.json` of a GGUF file's vocabulary, which `Tokenizer.from_gguf` has checked."""
    vocabulary: dict[str, int] = {}
    added = []
    kinds = metadata["tokenizer.ggml.token_type"]
    for index, token in enumerate(metadata["tokenizer.ggml.tokens"]):
        text = _text(token)
        if kinds[index] in (_CONTROL, _USER_DEFINED):
            added.append((index, text, bool(kinds[index] == _CONTROL)))
        else:  # unused ids, too: without them the library would number the added tokens anew
            vocabulary[text] = index
    merges = [_text(merge) for merge in metadata["tokenizer.ggml.merges"]]
    return tokenizer_json(vocabulary, merges, added)


def byte_tokenizer_json() -> dict[str, Any]:
    """A vocabulary for small experiments: the 256 bytes and the three tokens of ChatML."""
    vocabulary = {letter: byte for byte, letter in enumerate(gpt2_alphabet())}
    forms = (END_OF_TEXT, IM_START, IM_END)
    return tokenizer_json(vocabulary, [], [(256 + i, form, True) for i, form in enumerate(forms)])


def _text(value: str | bytes) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else value
