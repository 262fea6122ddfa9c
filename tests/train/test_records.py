"""Readers: what is malformed is reported with file and line, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_native.train.records import (
    Pair,
    Report,
    expand,
    read_chats,
    read_pairs,
    read_prompts,
    read_texts,
)

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(v if isinstance(v, str) else json.dumps(v) + "\n" for v in values))
    return path


def test_texts_of_every_kind_of_file(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.py").write_text("three")
    report = Report()
    found = [text for _, text in read_texts(expand([str(tmp_path)]), report)]
    assert found == ["one", "two"] * 3 + ["three"]
    assert (report.records, report.malformed, report.summary()) == (7, 0, "")


def test_malformed_texts_are_named_by_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": \n\n[1]\n{"txt": "x"}\n{"text": 5}\n{"text": ""}\n'
        b'{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": "also good"}'
    )
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    report = Report()
    found = list(read_texts(expand([str(tmp_path / "*")]), report))
    assert found == [(f"{path}:1", "good"), (f"{path}:10", "also good")]
    assert (report.records, report.malformed) == (11, 9)
    for problem in (
        f"{path}:2: is not JSON", f"{path}:4: is [1], expected an object",
        f"{path}:5: text is None", f"{path}:6: text is 5", f"{path}:7: text is ''",
        f"{path}:8: is not UTF-8", f"{path}:9: text holds a lone surrogate",
        "latin.txt: is not UTF-8 at byte 3", "empty.txt: is empty",
    ):  # fmt: skip
        assert problem in report.summary()
    with pytest.raises(ValueError, match="bad.jsonl:2: is not JSON"):
        list(read_texts([path], Report(strict=True)))


def test_only_the_first_problems_are_listed_but_all_are_counted(tmp_path):
    report = Report()
    assert not list(read_texts([lines(tmp_path / "a.jsonl", *(["[]\n"] * 50))], report))
    assert report.malformed == 50
    assert report.summary().endswith("and 30 more")


@given(st.binary(max_size=200))
def test_no_bytes_crash_a_reader(tmp_path_factory, data):
    """Every non-blank line of a .jsonl file is either used or reported."""
    folder = tmp_path_factory.mktemp("records")
    for suffix in (".jsonl", ".json", ".parquet", ".txt"):
        path = folder / f"x{suffix}"
        path.write_bytes(data)
        for reader in (read_texts, read_chats, read_pairs, read_prompts):
            if suffix == ".txt" and reader is not read_texts:
                continue
            report = Report()
            used = len(list(reader([path], report)))
            assert used + report.malformed == report.records
            if suffix == ".jsonl":
                assert report.records == sum(1 for x in data.split(b"\n") if x.strip())


def test_both_forms_of_chats(tmp_path):
    path = lines(
        tmp_path / "chats.jsonl",
        {"messages": [USER, ANSWER], "id": 1},
        {"conversations": [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "4"}]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    )
    report = Report()
    assert [chat for _, chat in read_chats([path], report)] == [[USER, ANSWER]] * 3
    assert not report.malformed


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({}, "has neither messages nor conversations"),
        ({"messages": []}, r"messages is \[\], expected a list of messages"),
        ({"messages": [USER, 3]}, r"messages\[1\] is 3, expected an object"),
        ({"messages": [{"role": "boss", "content": ""}]}, r"messages\[0\]: role is 'boss'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: content is None"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        (
            {"conversations": [{"from": "user"}]},
            r"conversations\[0\] is .* expected from and value",
        ),
        ({"conversations": [{"from": [], "value": ""}]}, r"role is \[\]"),
    ],
)
def test_malformed_chats(tmp_path, value, problem):
    path = lines(tmp_path / "chats.jsonl", {"messages": [USER, ANSWER]}, value)
    with pytest.raises(ValueError, match=f"chats.jsonl:2: .*{problem}"):
        list(read_chats([path], Report(strict=True)))


def test_pairs_in_their_forms(tmp_path):
    pair = Pair([USER], "4", "5")
    path = lines(
        tmp_path / "pairs.jsonl",
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": "5"},
        {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "5"}]},
        {"prompt": "2+2?", "chosen": "4", "rejected": "4"},
        {"chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": "4"},
        {"prompt": "2+2?", "chosen": [USER], "rejected": "5"},
    )
    report = Report()
    assert [found for _, found in read_pairs([path], report)] == [pair] * 3
    assert report.malformed == 4
    assert "chosen and rejected are the same" in report.summary()


def test_prompts(tmp_path):
    path = lines(
        tmp_path / "prompts.jsonl",
        {"prompt": "2+2?"}, {"prompt": [USER]}, {"messages": [USER]}, {"messages": [USER, ANSWER]},
    )  # fmt: skip
    report = Report()
    assert [found for _, found in read_prompts([path], report)] == [[USER]] * 3
    assert "prompts.jsonl:4: ends with role 'assistant', expected 'user'" in report.summary()


def test_missing_files_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"\*.jsonl: no such file"):
        expand([str(tmp_path / "*.jsonl")])
