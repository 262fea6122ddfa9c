#!/usr/bin/env python3
"""Make a small instruction set of the standard library's docstrings.

usage: python recipes/docstrings.py FOLDER

Writes FOLDER/train.jsonl and FOLDER/held_out.jsonl (one function in eight), chats with a question
about a function and the first paragraph of its docstring as the answer.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import zlib
from pathlib import Path

MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "cmath", "codecs", "collections",
    "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal",
    "difflib", "email.utils", "fileinput", "fnmatch", "fractions", "functools", "gettext",
    "glob", "gzip", "heapq", "html", "inspect", "io", "ipaddress", "itertools", "json",
    "linecache", "locale", "logging", "math", "mimetypes", "operator", "os", "os.path",
    "pathlib", "pickle", "platform", "pprint", "random", "re", "secrets", "shlex", "shutil",
    "signal", "socket", "statistics", "string", "struct", "subprocess", "tempfile", "textwrap",
    "threading", "time", "timeit", "tokenize", "traceback", "types", "typing", "unicodedata",
    "unittest", "urllib.parse", "uuid", "warnings", "weakref", "zipfile",
)  # fmt: skip
LONGEST = 400  # characters of an answer


def chats() -> dict[str, dict[str, object]]:
    """Qualified name to chat record, for every documented public function."""
    found: dict[str, dict[str, object]] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute, value in sorted(vars(module).items()):
            if attribute.startswith("_") or not callable(value):
                continue
            paragraphs = (inspect.getdoc(value) or "").split("\n\n")
            text = " ".join(paragraphs[-1 if "->" in paragraphs[0] else 0].split())
            if not 30 <= len(text) <= LONGEST or "object at" in text:
                continue
            question = f"What does Python's {name}.{attribute} do?"
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": text},
            ]
            found[f"{name}.{attribute}"] = {"messages": messages}
    return found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    for name, record in chats().items():
        part = "held_out" if zlib.crc32(name.encode()) % 8 == 0 else "train"
        parts[part].append(json.dumps(record) + "\n")
    for part, lines in parts.items():
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{len(lines)} chats: {folder / part}.jsonl")  # noqa: T201


if __name__ == "__main__":
    main()
