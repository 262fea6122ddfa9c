"""Training data as it comes: text, JSON, JSON lines and parquet files, record by record.

Whatever is wrong with a record is reported with its file and line and counted; it is never trained
on. What a record must hold depends on its use: a text, a chat, a preference pair or a prompt.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qwen_native.errors import quoted

T = TypeVar("T")
Message = dict[str, Any]

_MAX_LINE_BYTES = 1 << 28
_SHOWN = 20


@dataclass
class Report:
    """Counts records and keeps what was wrong with the first malformed ones.

    Attributes:
        records: how many were read, malformed ones included.
        malformed: how many could not be used.
        problems: "file:line: what is wrong" of the first 20.
        strict: raise at the first malformed record instead.
    """

    strict: bool = False
    records: int = 0
    malformed: int = 0
    problems: list[str] = field(default_factory=list)

    def reject(self, where: str, problem: str) -> None:
        """Count a malformed record."""
        if self.strict:
            raise ValueError(f"{where}: {problem}")
        self.malformed += 1
        if len(self.problems) < _SHOWN:
            self.problems.append(f"{where}: {problem}")

    def summary(self) -> str:
        """What to tell the user; empty when every record was fine."""
        if not self.malformed:
            return ""
        more = self.malformed - len(self.problems)
        lines = [*self.problems, *([f"… and {more} more"] if more else [])]
        head = f"{self.malformed} of {self.records} records are malformed and left out:"
        return "\n  ".join([head, *lines])


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, folders and glob patterns stand for, in sorted order.

    Raises:
        ValueError: a pattern stands for nothing.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
        elif path.exists():
            found = [path]
        else:
            found = [Path(name) for name in glob.glob(str(path), recursive=True)]
            found = [p for p in found if p.is_file()]
        if not found:
            raise ValueError(f"{pattern}: no such file, expected a file, a folder or a pattern")
        files += sorted(found)
    return files


def read_objects(path: Path, report: Report) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield ("file:line", object) of a .jsonl, .json (one list of objects) or .parquet file.

    Every record is counted in `report`; those that are no objects are rejected there.
    """
    if path.suffix == ".parquet":
        records = _read_parquet(path)
    elif path.suffix == ".jsonl":
        records = _read_lines(path)
    elif path.suffix == ".json":
        records = _read_list(path)
    else:
        raise ValueError(f"{path}: has no known type, expected .jsonl, .json or .parquet")
    for where, value in records:
        report.records += 1
        if isinstance(value, _Malformed):
            report.reject(where, value.problem)
        elif not isinstance(value, dict):
            report.reject(where, f"is {quoted(value)}, expected an object")
        else:
            yield where, value


@dataclass(frozen=True)
class _Malformed:
    problem: str


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Malformed(f"is not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return _Malformed(f"is not JSON: {error}")


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            where = f"{path}:{number}"
            if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield where, _Malformed(f"has more than {_MAX_LINE_BYTES} bytes")
            elif line.strip():
                yield where, _parse(line)


def _read_list(path: Path) -> Iterator[tuple[str, Any]]:
    values = _parse(path.read_bytes())
    if isinstance(values, _Malformed) or not isinstance(values, list):
        problem = values.problem if isinstance(values, _Malformed) else "holds no list of records"
        yield str(path), _Malformed(problem)
        return
    for i, value in enumerate(values):
        yield f"{path}[{i}]", value


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for value in batch.to_pylist():
                # Absent struct fields come as null; in JSON they would not be there.
                yield f"{path}[{row}]", _without_nulls(value)
                row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield f"{path}[{row}]", _Malformed(f"is not parquet: {' '.join(str(error).split())}")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _used(
    files: Sequence[Path], report: Report, convert: Callable[[Mapping[str, Any]], T]
) -> Iterator[tuple[str, T]]:
    """Yield ("file:line", converted record); `convert` raises ValueError for malformed ones."""
    for path in files:
        for where, value in read_objects(path, report):
            try:
                result = convert(value)
            except ValueError as error:
                report.reject(where, str(error))
                continue
            yield where, result


def read_texts(
    files: Sequence[Path], report: Report, key: str = "text"
) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", text) of every document: the field `key` of records in .jsonl, .json and
    .parquet files, and the whole of any other file."""
    for path in files:
        if path.suffix in (".jsonl", ".json", ".parquet"):
            yield from _used([path], report, lambda value: _text(value, key))
            continue
        report.records += 1
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            report.reject(str(path), f"is not UTF-8 at byte {error.start}")
            continue
        if text:
            yield str(path), text
        else:
            report.reject(str(path), "is empty")


def read_chats(files: Sequence[Path], report: Report) -> Iterator[tuple[str, list[Message]]]:
    """Yield ("file:line", messages) of chats in the two forms that are in use.

    `{"messages": [{"role": "user", "content": "..."}, ...]}` as OpenAI has it, or
    `{"conversations": [{"from": "user", "value": "..."}, ...]}` as the original Qwen's finetune.py.
    """
    return _used(files, report, chat_messages)


def read_prompts(files: Sequence[Path], report: Report) -> Iterator[tuple[str, list[Message]]]:
    """Yield ("file:line", messages) to be answered: `{"prompt": text or messages}` or a chat that
    ends with the user's turn."""

    return _used(files, report, prompt_messages)


def prompt_messages(value: Mapping[str, Any]) -> list[Message]:
    """The messages of one record to be answered; see `read_prompts`.

    Raises:
        ValueError: it has none, or does not end with the user's turn.
    """
    messages = _prompt(value["prompt"]) if "prompt" in value else chat_messages(value)
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"ends with role {messages[-1]['role']!r}, expected 'user'")
    return messages


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which people prefer the first.

    Attributes:
        prompt: messages, the user's last.
        chosen: the better answer, a text.
        rejected: the other one.
    """

    prompt: list[Message]
    chosen: str
    rejected: str


def read_pairs(files: Sequence[Path], report: Report) -> Iterator[tuple[str, Pair]]:
    """Yield ("file:line", pair) of records with `prompt`, `chosen` and `rejected`.

    The prompt is a text or messages; answers are texts, or lists of messages of which the last is
    the answer (and the ones before it, without a `prompt`, the prompt).
    """
    return _used(files, report, _pair)


def _pair(value: Mapping[str, Any]) -> Pair:
    answers, prompts = [], []
    for key in ("chosen", "rejected"):
        if key not in value:
            raise ValueError(f"{key} is missing")
        answer = value[key]
        if isinstance(answer, list):
            messages = _messages(answer, key)
            if messages[-1]["role"] != "assistant":
                raise ValueError(f"{key} ends with role {messages[-1]['role']!r}, not 'assistant'")
            answer = messages[-1]["content"]
            prompts.append(messages[:-1])
        if not isinstance(answer, str) or not answer:
            raise ValueError(f"{key} is {quoted(answer)}, expected a text")
        answers.append(answer)
    if "prompt" in value:
        prompt = _prompt(value["prompt"])
    elif len(prompts) == 2 and prompts[0] == prompts[1] and prompts[0]:
        prompt = prompts[0]
    else:
        raise ValueError("prompt is missing, and chosen and rejected do not begin with the same")
    if answers[0] == answers[1]:
        raise ValueError("chosen and rejected are the same")
    return Pair(prompt, answers[0], answers[1])


def _prompt(value: Any) -> list[Message]:
    if isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    return _messages(value, "prompt")


def chat_messages(value: Mapping[str, Any]) -> list[Message]:
    """The messages of one chat record in either form; see `read_chats`.

    Raises:
        ValueError: it has neither form, or a turn is not as expected.
    """
    if "messages" in value:
        return _messages(value["messages"], "messages")
    if "conversations" not in value:
        raise ValueError("has neither messages nor conversations")
    turns = value["conversations"]
    if not isinstance(turns, list):
        raise ValueError(f"conversations is {quoted(turns)}, expected a list")
    roles = {"human": "user", "gpt": "assistant"}  # as ShareGPT has them
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"conversations[{i}] is {quoted(turn)}, expected from and value")
        source = turn["from"]
        role = roles.get(source, source) if isinstance(source, str) else source
        messages.append({"role": role, "content": turn["value"]})
    return _messages(messages, "conversations")


def _messages(value: Any, name: str) -> list[Message]:
    """Check what every use needs; `ChatFormat` checks the rest."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {quoted(value)}, expected a list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{name}[{i}] is {quoted(message)}, expected an object")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(
                f"{name}[{i}]: role is {quoted(role)}, expected system, user, assistant or tool"
            )
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"{name}[{i}]: content is {quoted(content)}, expected a text")
        try:
            (content or "").encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{name}[{i}]: content holds a lone surrogate") from None
    return value


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{key} is {quoted(text)}, expected a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{key} holds a lone surrogate") from None
    return text
