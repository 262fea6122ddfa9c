"""Byte-level BPE tokenizer of the Qwen family over `tiktoken`.

Text is NFC-normalised, split by `SPLIT_PATTERN` and merged by lowest rank. The vocabulary comes
from any of the four forms in which checkpoints carry it; all four give the same ids for the same
model. Every file is treated as hostile: whatever is wrong with it is a `CheckpointError` that names
the entry.

Ordinary text never becomes a special token: `Tokenizer.encode` has no way to produce one. Only
`Tokenizer.encode_with_special`, meant for prompts whose author is trusted, reads their surface
forms.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import codecs
import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

import numpy as np

from qwen_native.errors import CheckpointError, quoted
from qwen_native.token_table import Overlay, TokenTable, encode_short

if TYPE_CHECKING:
    import tiktoken

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pre-tokenisation pattern of every Qwen generation: cl100k's, with single digits."""

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"

# The special tokens of the original Qwen, which its vocabulary file does not list: they follow its
# last rank.
_QWEN1_SPECIAL = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))

_MAX_ID = 1 << 22
_MAX_FILE_BYTES = 1 << 28

# tiktoken merges long pieces in linear time since 0.13. Its regex engine keeps one stack entry per
# character of a whitespace run and panics at a million.
_LONG_WHITESPACE = 100_000
_WHITESPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")

# CPython orders the combining marks of one base character by insertion, in quadratic time.
_MARK_STRIDE = 256


def gpt2_alphabet() -> list[str]:
    """Give the character by which GPT-2's vocabulary files write each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in alphabet)
    alphabet.update((byte, chr(0x100 + i)) for i, byte in enumerate(others))
    return [alphabet[byte] for byte in range(256)]


_NOT_A_BYTE = 0xFFFF
_BYTE_OF_CODE = np.full(0x146, _NOT_A_BYTE, np.uint16)
for _byte, _char in enumerate(gpt2_alphabet()):
    _BYTE_OF_CODE[ord(_char)] = _byte


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole and never built by merges.

    Attributes:
        id: Its token id.
        content: Its surface form.
        special: True for control tokens, which `decode` leaves out by default; False for markup
            such as `<tool_call>` or `<think>`, which stays visible.
    """

    id: int
    content: str
    special: bool


class Tokenizer:
    """Text to token ids and back, with the rules of the Qwen family.

    Made by `from_tiktoken`, `from_vocab_merges`, `from_tokenizer_json`, `from_gguf` or
    `from_folder`.

    Attributes:
        added: The added tokens: control tokens and markup tokens alike.
        special_tokens: Surface form → id of each of them.
        vocab_size: Largest id that has a row in the vocabulary, plus one. Embedding tables may have
            more rows.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        ids: Sequence[int],
        added: Sequence[AddedToken],
        ranks: dict[bytes, int],
        rank_to_id: list[int] | None = None,
        vocab_size: int = 0,
    ) -> None:
        """Assemble checked parts; the constructors named above do the checking.

        Args:
            tokens: Bytes of each ordinary token.
            ids: Its id; distinct.
            added: The added tokens, with other ids.
            ranks: Merge rank of each token that merging can produce, 0 merged first; all single
                bytes included.
            rank_to_id: Id of each rank, or None where rank and id are the same.
            vocab_size: Lower bound for `vocab_size`, for vocabularies that end in unused ids.
        """
        last = max(max(ids, default=-1), max((token.id for token in added), default=-1))
        self.vocab_size = max(last + 1, vocab_size)
        self._ranks = ranks
        self._rank_to_id = rank_to_id
        self._short: TokenTable | None = None
        plain = [b""] * self.vocab_size
        if _counts_up(ids):
            plain[: len(tokens)] = tokens
        else:
            for index, token in zip(ids, tokens, strict=True):
                plain[index] = token
        self._plain: Sequence[bytes] = plain
        visible = plain.copy()
        surface = plain.copy()
        for entry in added:
            surface[entry.id] = entry.content.encode()
            visible[entry.id] = b"" if entry.special else surface[entry.id]
        self._bytes: Sequence[bytes] = surface
        self._visible_bytes: Sequence[bytes] = visible
        self._set_added(added)

    def _set_added(self, added: Sequence[AddedToken]) -> None:
        self.added = tuple(added)
        self.special_tokens = {token.content: token.id for token in added}
        # Longest first, so that a token is never hidden by another that is its prefix.
        forms = sorted(self.special_tokens, key=len, reverse=True)
        self._special_split = (
            re.compile("(" + "|".join(map(re.escape, forms)) + ")") if forms else None
        )

    @classmethod
    def from_table(
        cls, table: TokenTable, added: Sequence[AddedToken], vocab_size: int
    ) -> Tokenizer:
        """Use a vocabulary where it lies; nothing is built until long text is encoded.

        Args:
            table: The ordinary tokens.
            added: The added tokens; their ids have no bytes in the table.
            vocab_size: Number of ids; at least the table's.

        Raises:
            CheckpointError: Two tokens have one id or one text, or an id is out of range.
        """
        _check_added(added, "the token table")
        if not len(table) <= vocab_size <= _MAX_ID:
            raise CheckpointError(
                f"vocab_size is {vocab_size}, expected {len(table)} to {_MAX_ID} ids"
            )
        for token in added:
            if token.id >= vocab_size or (token.id < len(table) and table[token.id]):
                raise CheckpointError(
                    f"added token {quoted(token.content)} has id {token.id}, expected one below "
                    f"{vocab_size} that no ordinary token has"
                )
        self = cls.__new__(cls)
        self.vocab_size = vocab_size
        self._short = self._plain = table
        surface = {token.id: token.content.encode() for token in added}
        visible = {token.id: b"" if token.special else surface[token.id] for token in added}
        self._bytes = Overlay(table, surface, vocab_size)
        self._visible_bytes = Overlay(table, visible, vocab_size)
        self._set_added(added)
        return self

    def table(self) -> TokenTable:
        """Return the ordinary tokens as flat arrays; with `added` all that `from_table` needs."""
        if self._short is not None:
            return self._short
        return TokenTable.build(self._plain, self._ranks, self._rank_to_id)

    def compact(self) -> Tokenizer:
        """Return the same tokenizer over flat arrays: a tenth of the memory, and short text is
        encoded at once; the merge engine is built for the first long one."""
        return Tokenizer.from_table(self.table(), self.added, self.vocab_size)

    @functools.cached_property
    def _ranks(self) -> dict[bytes, int]:
        assert self._short is not None
        return self._short.rank_dict()

    @functools.cached_property
    def _rank_to_id(self) -> list[int] | None:
        assert self._short is not None
        return self._short.rank_to_id()

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        """The merge engine. Built at first use: it is most of the cost, and decoding does
        without."""
        import tiktoken

        return tiktoken.Encoding(
            "qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=self._ranks, special_tokens={}
        )

    @classmethod
    def from_tiktoken(cls, path: str | Path) -> Tokenizer:
        """Read `qwen.tiktoken`: lines of a base64 token and its rank, which is also its id.

        The special tokens of the original Qwen follow the last rank: `<|endoftext|>`,
        `<|im_start|>`, `<|im_end|>`, `<|extra_0|>` … `<|extra_204|>`.

        Raises:
            CheckpointError: The file is malformed, or its ranks are not 0 … n-1, each once.
        """
        path = Path(path)
        tokens: dict[int, bytes] = {}
        for number, line in enumerate(_read(path).splitlines(), start=1):
            fields = line.split()
            if not fields:
                continue
            where = f"{path}, line {number}"
            if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > 7:
                raise CheckpointError(
                    f"{where}: {quoted(line)}, expected a base64 token and its rank"
                )
            try:
                token = base64.b64decode(fields[0], validate=True)
            except binascii.Error as error:
                raise CheckpointError(
                    f"{where}: {quoted(fields[0])} is not base64: {error}"
                ) from None
            rank = int(fields[1])
            if rank in tokens:
                raise CheckpointError(f"{where}: rank {rank} appears twice, expected each once")
            tokens[rank] = token
        ids = _as_range(sorted(tokens))
        if not _counts_up(ids):
            hole = next(i for i, rank in enumerate(ids) if i != rank)
            raise CheckpointError(
                f"{path}: rank {hole} is missing, expected ranks 0 … {len(ids) - 1}"
            )
        ordered = [tokens[i] for i in ids]
        added = [
            AddedToken(len(ids) + i, content, True) for i, content in enumerate(_QWEN1_SPECIAL)
        ]
        return cls(ordered, ids, added, _unique_ranks(ordered, ids, str(path)))

    @classmethod
    def from_vocab_merges(
        cls, vocab: str | Path, merges: str | Path, added: Sequence[AddedToken] = ()
    ) -> Tokenizer:
        """Read `vocab.json` and `merges.txt` (GPT-2 byte alphabet).

        Args:
            vocab: JSON object of token → id.
            merges: One merge per line, best first, after an optional `#version` line.
            added: The added tokens; see `read_added_tokens`.

        Raises:
            CheckpointError: A file is malformed, or the two do not agree.
        """
        vocab, merges = Path(vocab), Path(merges)
        texts, ids = _checked_vocab(_read_json(vocab), str(vocab))
        try:
            lines = _read(merges).decode().split("\n")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{merges}: not UTF-8: {error}") from None
        lines = [line.removesuffix("\r") for line in lines]
        if lines[0].startswith("#version"):
            del lines[0]
        while lines and not lines[-1]:
            del lines[-1]
        return cls._assemble(texts, ids, lines, added, f"{vocab} and {merges.name}")

    @classmethod
    def from_tokenizer_json(cls, path: str | Path, added: Sequence[AddedToken] = ()) -> Tokenizer:
        """Read a `tokenizer.json` of the `tokenizers` library.

        Args:
            path: The file.
            added: Added tokens listed elsewhere (`tokenizer_config.json`), joined with the file's
                own.

        Raises:
            CheckpointError: The file is malformed, or describes something else than Qwen's scheme:
                byte-level BPE after NFC and `SPLIT_PATTERN`.
        """
        path = Path(path)
        root = _object(_read_json(path), str(path))
        model = _object(root.get("model"), f"{path}: model")
        if model.get("type", "BPE") != "BPE":
            raise CheckpointError(
                f"{path}: model.type is {quoted(model.get('type'))}, expected 'BPE'"
            )
        normalizer = root.get("normalizer")
        if not isinstance(normalizer, dict) or normalizer.get("type") != "NFC":
            raise CheckpointError(f"{path}: normalizer is {quoted(normalizer)}, expected NFC")
        patterns = list(_split_patterns(root.get("pre_tokenizer")))
        if patterns != [SPLIT_PATTERN]:
            raise CheckpointError(
                f"{path}: pre_tokenizer splits by {quoted(patterns)}, expected Qwen's pattern "
                f"{SPLIT_PATTERN!r}"
            )
        merges = model.get("merges")
        if not isinstance(merges, list):
            raise CheckpointError(f"{path}: model.merges is {quoted(merges)}, expected a list")
        pairs = [" ".join(m) if _is_pair(m) else m for m in merges]
        own: list[AddedToken] = []
        entries = root.get("added_tokens", [])
        if not isinstance(entries, list):
            raise CheckpointError(f"{path}: added_tokens is {quoted(entries)}, expected a list")
        for i, entry in enumerate(entries):
            where = f"{path}: added_tokens[{i}]"
            fields = _object(entry, where)
            own.append(_added_token(fields.get("id"), fields, where))
        texts, ids = _checked_vocab(model.get("vocab"), f"{path}: model.vocab")
        return cls._assemble(texts, ids, pairs, _join_added(own, added, str(path)), str(path))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Build from the metadata of a GGUF file.

        Args:
            metadata: `tokenizer.ggml.model` ("gpt2"), `.pre` ("qwen2"), `.tokens` (str or UTF-8
                bytes in GPT-2's alphabet), `.token_type` and `.merges`. That ids are ranks is
                checked against a list of merges; any other sequence is taken for lazy, and 256
                tokens are tried instead of reading it.

        Raises:
            CheckpointError: A key is missing, or holds something else.
        """
        prefix = "tokenizer.ggml."
        for key, expected in (("model", "gpt2"), ("pre", "qwen2")):
            if (value := metadata.get(prefix + key)) != expected:
                raise CheckpointError(f"{prefix}{key} is {quoted(value)}, expected {expected!r}")
        tokens = metadata.get(prefix + "tokens")
        if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence) or not tokens:
            raise CheckpointError(
                f"{prefix}tokens is {quoted(tokens)}, expected an array of strings"
            )
        types = _integers(metadata.get(prefix + "token_type"), prefix + "token_type")
        if len(types) != len(tokens):
            raise CheckpointError(
                f"{prefix}token_type has {len(types)} entries, expected {len(tokens)}"
            )
        # 1 normal, 3 control, 4 user defined (matched whole, shown when decoded), 5 unused.
        unknown = np.flatnonzero(~np.isin(types, (1, 3, 4, 5)))
        if unknown.size:
            i = int(unknown[0])
            raise CheckpointError(f"{prefix}token_type[{i}] is {types[i]}, expected 1, 3, 4 or 5")
        added = []
        for i in np.flatnonzero((types == 3) | (types == 4)).tolist():
            content = _joined([tokens[i]], prefix + f"tokens[{i}]")
            added.append(AddedToken(i, content, special=bool(types[i] == 3)))
        ids = _as_range(np.flatnonzero(types == 1).tolist())
        normal = tokens[: len(ids)] if _counts_up(ids) else [tokens[i] for i in ids]
        merges = metadata.get(prefix + "merges")
        if merges is not None and (
            isinstance(merges, str | bytes) or not isinstance(merges, Sequence)
        ):
            raise CheckpointError(
                f"{prefix}merges is {quoted(merges)}, expected an array of strings"
            )
        return cls._assemble(normal, ids, merges, added, prefix + "tokens", len(tokens))

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer | None:
        """Build from the tokenizer files of a checkpoint folder, or return None if it has none.

        Looks for `qwen.tiktoken`, then `tokenizer.json`, then `vocab.json` with `merges.txt`; the
        latter two are completed by the added tokens of `tokenizer_config.json` and
        `added_tokens.json`.

        Raises:
            CheckpointError: A file is malformed, or one of a pair is missing.
        """
        folder = Path(path)
        if (folder / "qwen.tiktoken").exists():
            return cls.from_tiktoken(folder / "qwen.tiktoken")
        if (folder / "tokenizer.json").exists():
            return cls.from_tokenizer_json(folder / "tokenizer.json", read_added_tokens(folder))
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        if vocab.exists() != merges.exists():
            missing, present = (merges, vocab) if vocab.exists() else (vocab, merges)
            raise CheckpointError(
                f"{folder}: {missing.name} is missing, expected it beside {present.name}"
            )
        if vocab.exists():
            return cls.from_vocab_merges(vocab, merges, read_added_tokens(folder))
        return None

    @classmethod
    def _assemble(
        cls,
        texts: Sequence[object],
        ids: Sequence[int],
        merges: Sequence[object] | None,
        added: Sequence[AddedToken],
        source: str,
        vocab_size: int = 0,
    ) -> Tokenizer:
        """Check a GPT-2 style vocabulary and build the tokenizer.

        Args:
            texts: The tokens in GPT-2's byte alphabet, as str or UTF-8 bytes.
            ids: The id of each.
            merges: See `from_gguf`.
            added: The added tokens; the vocabulary may list them too.
            source: Where all this comes from, for messages.
            vocab_size: Number of ids if it is known; the vocabulary then may have holes.
        """
        _check_added(added, source)
        contents = {token.id: token.content for token in added}
        if not _counts_up(ids) or (contents and min(contents) < len(ids)):
            pairs = sorted(zip(ids, texts, strict=True), key=lambda pair: pair[0])
            pairs = [(index, text) for index, text in pairs if contents.get(index) != text]
            _check_ids(pairs, contents, source, holes=vocab_size > 0)
            ids, texts = _as_range([index for index, _ in pairs]), [text for _, text in pairs]
        if not texts:
            raise CheckpointError(f"{source}: no ordinary tokens, expected at least the 256 bytes")
        joined = _joined(texts, source)
        tokens = _from_alphabet(joined, ids, source)
        ranks = _unique_ranks(tokens, ids, source)
        if _ranks_are_ids(ranks, joined, tokens, merges):
            return cls(tokens, ids, added, ranks, None, vocab_size)
        if merges is None:
            raise CheckpointError(
                f"{source}: no merges, expected them as ids 0 … 255 are not the single bytes"
            )
        ranks, rank_to_id = _ranks_from_merges(joined.split("\n"), tokens, ids, merges, source)
        return cls(tokens, ids, added, ranks, rank_to_id, vocab_size)

    @property
    def eod(self) -> int:
        """Id of `<|endoftext|>`, which ends a document. ValueError if the vocabulary lacks it."""
        return self._special(END_OF_TEXT)

    @property
    def im_start(self) -> int:
        """Id of `<|im_start|>`, which opens a chat turn. ValueError if the vocabulary lacks it."""
        return self._special(IM_START)

    @property
    def im_end(self) -> int:
        """Id of `<|im_end|>`, which ends a chat turn. ValueError if the vocabulary lacks it."""
        return self._special(IM_END)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text: `<|im_end|>` and `<|endoftext|>`, as far as the vocabulary has
        them."""
        ids = (self.special_tokens.get(form) for form in (IM_END, END_OF_TEXT))
        return tuple(index for index in ids if index is not None)

    def encode(self, text: str) -> list[int]:
        """Encode ordinary text; surface forms of special tokens are text like any other.

        Raises:
            ValueError: `text` holds a lone surrogate, which no UTF-8 text can.
        """
        text = _normalised(text)
        if self._short is not None and "_encoding" not in self.__dict__:
            short = encode_short(self._short, text)
            if short is not None:
                return short
        ids: list[int] = []
        for part, whole in _safe_parts(text):
            # `_encode_single_piece` is `encode_ordinary` without the split.
            encode = (
                self._encoding._encode_single_piece if whole else self._encoding.encode_ordinary
            )
            ids += encode(part)
        if self._rank_to_id is not None:
            ids = [self._rank_to_id[rank] for rank in ids]
        return ids

    def encode_with_special(self, text: str) -> list[int]:
        """Encode text in which the surface forms of added tokens stand for these tokens.

        For completion prompts written by the caller; never for text from elsewhere. The longest
        form wins where several match. As in the `tokenizers` library, the text between them is
        normalised piece by piece.

        Raises:
            ValueError: `text` holds a lone surrogate.
        """
        ids: list[int] = []
        for part in self.split_special(text):
            ids += [part] if isinstance(part, int) else self.encode(part)
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """Split text at the surface forms of added tokens, which become ids; the rest is text."""
        if self._special_split is None:
            return [text] if text else []
        parts = enumerate(self._special_split.split(text))
        return [self.special_tokens[part] if i % 2 else part for i, part in parts if part]

    def decode(self, ids: Iterable[int], skip_special: bool = True, errors: str = "replace") -> str:
        """Turn ids into text.

        Args:
            ids: Token ids. Ids without a token (unused ones, padded embedding rows) give nothing.
            skip_special: Leave control tokens out; markup tokens such as `<think>` always stay.
            errors: What to do with bytes that are not UTF-8: "replace", "ignore" or "strict".

        Raises:
            ValueError: An id is negative, or (with `errors="strict"`) the bytes are not UTF-8.
        """
        table = self._visible_bytes if skip_special else self._bytes
        return b"".join(_lookup(table, index) for index in ids).decode("utf-8", errors)

    def token_bytes(self, index: int) -> bytes:
        """Give the bytes of one token: the surface form in UTF-8 for added tokens.

        Raises:
            ValueError: The vocabulary has no token with this id.
        """
        data = _lookup(self._bytes, index)
        if not data:
            raise ValueError(f"id {index} has no token in this vocabulary of {self.vocab_size} ids")
        return data

    def stream_decoder(self, skip_special: bool = True) -> StreamDecoder:
        """Make an incremental decoder; its whole output equals `decode` of all ids."""
        return StreamDecoder(self._visible_bytes if skip_special else self._bytes)

    def _special(self, form: str) -> int:
        if form not in self.special_tokens:
            raise ValueError(f"the vocabulary has no {form} token, which chat and text ends need")
        return self.special_tokens[form]


class StreamDecoder:
    """Decodes ids one at a time and holds back the bytes of an unfinished character.

    Made by `Tokenizer.stream_decoder`. The cost of a push does not depend on what came before.
    """

    def __init__(self, table: Sequence[bytes]) -> None:
        """Start at the beginning of a text; `table` holds the bytes of each id."""
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """Give the characters that this id completes; often one or more, possibly none."""
        return self._decoder.decode(_lookup(self._table, index))

    def finish(self) -> str:
        """End the text: bytes still held back become U+FFFD. The decoder is then as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def read_added_tokens(folder: str | Path) -> list[AddedToken]:
    """Read the added tokens of a Hugging Face folder, sorted by id.

    From `added_tokens_decoder` in `tokenizer_config.json`, then from `added_tokens.json`, which
    does not say which tokens are control tokens: those written `<|…|>` are.

    Raises:
        CheckpointError: A file is malformed or the two contradict each other.
    """
    folder = Path(folder)
    first: list[AddedToken] = []
    config_path = folder / "tokenizer_config.json"
    if config_path.exists():
        config = _object(_read_json(config_path), str(config_path))
        where = f"{config_path}: added_tokens_decoder"
        for key, entry in _object(config.get("added_tokens_decoder", {}), where).items():
            plain = key.isdecimal() and key.isascii() and len(key) <= 7
            index: object = int(key) if plain else key
            first.append(_added_token(index, _object(entry, f"{where}[{key!r}]"), where))
    second: list[AddedToken] = []
    added_path = folder / "added_tokens.json"
    if added_path.exists():
        known = {token.content: token.special for token in first}
        for content, index in _object(_read_json(added_path), str(added_path)).items():
            control = content.startswith("<|") and content.endswith("|>")
            fields = {"content": content, "special": known.get(content, control)}
            second.append(_added_token(index, fields, str(added_path)))
    return _join_added(first, second, str(folder))


def _lookup(table: Sequence[bytes], index: int) -> bytes:
    if index < 0:
        raise ValueError(f"token id {index} is negative, expected 0 or more")
    return table[index] if index < len(table) else b""


def _normalised(text: str) -> str:
    """Give the NFC form of `text`, in time linear in its length."""
    if not isinstance(text, str):
        raise TypeError(f"text is {type(text).__name__}, expected str")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate U+{ord(text[error.start]):04X} at position {error.start}, "
            "expected valid Unicode"
        ) from None
    return unicodedata.normalize("NFC", _marks_in_order(text))


def _is_mark(char: str) -> bool:
    """Say whether the canonical decomposition of `char` starts with a combining mark."""
    return unicodedata.combining(unicodedata.normalize("NFD", char)[0]) != 0


def _marks_in_order(text: str) -> str:
    """Put long runs of combining marks into canonical order, which `unicodedata` does too, but
    slowly."""
    parts: list[str] = []
    done = 0
    for probe in range(_MARK_STRIDE, len(text), _MARK_STRIDE):
        if probe < done or not _is_mark(text[probe]):
            continue
        start, stop = probe, probe + 1
        while start > done and _is_mark(text[start - 1]):
            start -= 1
        while stop < len(text) and _is_mark(text[stop]):
            stop += 1
        decomposed = "".join(unicodedata.normalize("NFD", char) for char in text[start:stop])
        parts += [text[done:start], "".join(sorted(decomposed, key=unicodedata.combining))]
        done = stop
    return "".join(parts) + text[done:] if parts else text


def _safe_parts(text: str) -> Iterator[tuple[str, bool]]:
    """Cut `text` where the split pattern cuts too, so that no part holds a long whitespace run to
    split.

    Yields:
        A part, and whether it is one piece by itself, not to be split further.
    """
    done = 0
    if len(text) >= _LONG_WHITESPACE:
        for run in _WHITESPACE.finditer(text):
            start, stop = run.span()
            if stop - start < _LONG_WHITESPACE:
                continue
            # Line ends belong to punctuation before them. Then `\s*[\r\n]+` takes all up to the
            # last line end, and the rest is a piece too, except that its last character goes to
            # what follows.
            if start and unicodedata.category(text[start - 1])[0] not in "LN":
                start += len(run[0]) - len(run[0].lstrip("\r\n"))
            if start > done:
                yield text[done:start], False
            lines_end = max(text.rfind("\r", start, stop), text.rfind("\n", start, stop)) + 1
            if lines_end > start:
                yield text[start:lines_end], True
                start = lines_end
            done = stop if stop == len(text) else max(start, stop - 1)
            if done > start:
                yield text[start:done], True
    if done < len(text):
        yield text[done:], False


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {_MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_json(path: Path) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path}: key {quoted(twice)} appears twice, expected each once")
        return found

    try:
        return json.loads(_read(path), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {quoted(value)}, expected a JSON object")
    return value


def _is_pair(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_ID


def _added_token(index: object, fields: Mapping[str, object], where: str) -> AddedToken:
    content, special = fields.get("content"), fields.get("special", False)
    if not _is_id(index):
        raise CheckpointError(
            f"{where}: id {quoted(index)} of an added token, expected 0 … {_MAX_ID - 1}"
        )
    if not isinstance(content, str) or not isinstance(special, bool):
        raise CheckpointError(
            f"{where}: added token {index} has content {quoted(content)} and special "
            f"{quoted(special)}, expected a string and a boolean"
        )
    return AddedToken(index, content, special)


def _join_added(
    first: Sequence[AddedToken], second: Sequence[AddedToken], where: str
) -> list[AddedToken]:
    """Unite two lists of added tokens; where both have a token, the first says whether it is
    special."""
    joined = list(first)
    known = {(token.id, token.content) for token in first}
    joined += [token for token in second if (token.id, token.content) not in known]
    _check_added(joined, where)
    return sorted(joined, key=lambda token: token.id)


def _check_added(added: Sequence[AddedToken], where: str) -> None:
    by_id: dict[int, str] = {}
    by_content: dict[str, int] = {}
    for token in added:
        if not token.content:
            raise CheckpointError(f"{where}: added token {token.id} is empty, expected text")
        try:
            token.content.encode()
        except UnicodeEncodeError:
            raise CheckpointError(
                f"{where}: added token {token.id} {quoted(token.content)} is not valid Unicode"
            ) from None
        if token.id in by_id or token.content in by_content:
            other = by_id.get(token.id, token.content)
            raise CheckpointError(
                f"{where}: added token {quoted(token.content)} with id {token.id} collides with "
                f"{quoted(other)} with id {by_content[other]}, expected each once"
            )
        by_id[token.id] = token.content
        by_content[token.content] = token.id


def _checked_vocab(value: object, where: str) -> tuple[list[str], Sequence[int]]:
    vocab = _object(value, where)
    ids: list[int] = []
    for text, index in vocab.items():
        if not _is_id(index):
            raise CheckpointError(
                f"{where}: token {quoted(text)} has id {quoted(index)}, expected 0 … {_MAX_ID - 1}"
            )
        ids.append(index)
    return list(vocab), _as_range(ids)


def _as_range(ids: Sequence[int]) -> Sequence[int]:
    """Give `range(n)` for the ids 0 … n-1 in order, so that later checks of this cost nothing."""
    return range(len(ids)) if ids == list(range(len(ids))) else ids


def _counts_up(ids: Sequence[int]) -> bool:
    return ids == range(len(ids))


def _check_ids(
    pairs: Sequence[tuple[int, object]], added: Mapping[int, str], where: str, holes: bool
) -> None:
    """Check that sorted ids are distinct, that no added token takes one and, unless allowed, that
    none is free."""
    expected = 0
    for index, text in pairs:
        if index in added or index < expected:
            other = quoted(added[index]) if index in added else "another token"
            raise CheckpointError(
                f"{where}: id {index} is both {quoted(text)} and {other}, expected one"
            )
        while expected < index and not holes:
            if expected not in added:
                raise CheckpointError(
                    f"{where}: id {expected} has no token, expected one for each id"
                )
            expected += 1
        expected = index + 1


def _joined(texts: Sequence[object], where: str) -> str:
    """Join an array of str or of UTF-8 bytes by line ends, which GPT-2's byte alphabet lacks."""
    try:
        if texts and isinstance(texts[0], bytes):
            joined = b"\n".join(cast(Sequence[bytes], texts)).decode()
        else:
            joined = "\n".join(cast(Sequence[str], texts))
            joined.encode()
    except (TypeError, UnicodeError) as error:
        raise CheckpointError(f"{where} holds something else than UTF-8 strings: {error}") from None
    if joined.count("\n") != max(len(texts) - 1, 0):
        raise CheckpointError(
            f"{where} holds a line end inside a token, expected GPT-2's byte alphabet"
        )
    return joined


def _integers(value: object, where: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        array = np.empty(())
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise CheckpointError(f"{where} is {quoted(value)}, expected an array of integers")
    return array.astype(np.int64)


def _from_alphabet(joined: str, ids: Sequence[int], where: str) -> list[bytes]:
    """Turn tokens written in GPT-2's byte alphabet, joined by line ends, into bytes, all at
    once."""
    codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    data = _BYTE_OF_CODE[np.minimum(codes, len(_BYTE_OF_CODE) - 1)]
    line_end = codes == ord("\n")
    ends = [*np.flatnonzero(line_end).tolist(), len(codes)]
    wrong = np.flatnonzero((data == _NOT_A_BYTE) & ~line_end)
    if wrong.size:
        i = bisect.bisect(ends, int(wrong[0]))
        raise CheckpointError(
            f"{where}: token {ids[i]} {quoted(joined.split(chr(10))[i])} has "
            f"U+{codes[wrong[0]]:04X}, which is not in GPT-2's byte alphabet"
        )
    table = data.astype(np.uint8).tobytes()
    starts = [0, *(np.flatnonzero(line_end) + 1).tolist()]
    return list(map(table.__getitem__, map(slice, starts, ends)))


def _unique_ranks(tokens: Sequence[bytes], ids: Sequence[int], where: str) -> dict[bytes, int]:
    """Map tokens to their ids as ranks; tiktoken needs them distinct and every single byte among
    them."""
    ranks = dict(zip(tokens, ids, strict=True))
    if len(ranks) != len(tokens):
        i = next(i for token, i in zip(tokens, ids, strict=True) if ranks[token] != i)
        token = tokens[ids.index(i)]
        raise CheckpointError(
            f"{where}: ids {i} and {ranks[token]} are both {quoted(token)}, expected one"
        )
    if b"" in ranks:
        raise CheckpointError(f"{where}: token {ranks[b'']} is empty, expected text")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise CheckpointError(f"{where}: byte 0x{byte:02X} has no token, expected all 256")
    return ranks


def _merge_text(merge: object) -> str:
    return merge.decode() if isinstance(merge, bytes) else merge if isinstance(merge, str) else ""


def _ranks_are_ids(
    ids: Mapping[bytes, int],
    joined: str,
    tokens: Sequence[bytes],
    merges: Sequence[object] | None,
) -> bool:
    """Say whether the single bytes have ids 0 … 255 and merge k makes token 256 + k, as in every
    Qwen model."""
    if ids[tokens[-1]] != len(tokens) - 1 or {len(token) for token in tokens[:256]} != {1}:
        return False
    if merges is None:
        return True
    if len(merges) != len(tokens) - 256:
        return False
    if not isinstance(merges, list | tuple):
        step = max(1, len(merges) // 256)
        return all(_is_one_merge(token, ids) for token in tokens[256::step])
    try:
        merged = _joined(merges, "merges")
    except CheckpointError:
        return False
    made = joined.split("\n", 256)[256] if merges else ""
    # One space inside each merge; the alphabet has none.
    return merged.count(" ") == len(merges) and merged.replace(" ", "") == made


def _is_one_merge(token: bytes, ranks: Mapping[bytes, int]) -> bool:
    """Say whether merging `token` by the ranks below its own ends with two parts."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        pair = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        best = min(pair)
        if best >= limit:
            return False
        i = pair.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return len(parts) == 2


def _ranks_from_merges(
    texts: Sequence[str],
    tokens: Sequence[bytes],
    ids: Sequence[int],
    merges: Sequence[object],
    where: str,
) -> tuple[dict[bytes, int], list[int]]:
    """Number the tokens in the order of merging: single bytes, then what each merge makes.

    Tokens that no merge makes get no rank: encoding cannot produce them.

    Returns:
        Rank of each token, and id of each rank.
    """
    data = dict(zip(texts, tokens, strict=True))
    index = dict(zip(texts, ids, strict=True))
    ranks: dict[bytes, int] = {}
    rank_to_id: list[int] = []
    for text in sorted((text for text in texts if len(text) == 1), key=index.__getitem__):
        ranks[data[text]] = len(rank_to_id)
        rank_to_id.append(index[text])
    for k, merge in enumerate(merges):
        try:
            parts = _merge_text(merge).split(" ")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{where}: merge {k} is not UTF-8: {error}") from None
        if len(parts) != 2 or not all(parts):
            raise CheckpointError(f"{where}: merge {k} is {quoted(merge)}, expected two tokens")
        for part in (*parts, "".join(parts)):
            if part not in data:
                raise CheckpointError(
                    f"{where}: merge {k} {quoted(merge)} needs {quoted(part)}, "
                    "which is not in the vocabulary"
                )
        made = "".join(parts)
        if data[made] not in ranks:
            ranks[data[made]] = len(rank_to_id)
            rank_to_id.append(index[made])
    return ranks, rank_to_id


def _split_patterns(pre_tokenizer: object) -> Iterator[str]:
    """Find the patterns of all `Split` steps in the `pre_tokenizer` of a `tokenizer.json`."""
    if not isinstance(pre_tokenizer, dict):
        return
    steps = pre_tokenizer.get("pretokenizers")
    for step in steps if isinstance(steps, list) else [pre_tokenizer]:
        if isinstance(step, dict) and step.get("type") == "Split":
            pattern = step.get("pattern")
            regex = pattern.get("Regex") if isinstance(pattern, dict) else None
            yield regex if isinstance(regex, str) else str(pattern)
