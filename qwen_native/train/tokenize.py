"""`qwen-native train tokenize`: token shards of text files, once for many runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qwen_native.checkpoint import open_checkpoint
from qwen_native.hub import resolve_model
from qwen_native.packed_cache import load_tokenizer
from qwen_native.train.metrics import Metrics
from qwen_native.train.pretrain import tokenize

EXAMPLES = """
  qwen-native train tokenize shards/ 'corpus/*.jsonl' --model Qwen/Qwen2.5-0.5B
  qwen-native train tokenize shards/ /usr/lib/python3/**/*.py --model demo"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="qwen-native train tokenize",
        description="Tokenise documents into memory-mapped shards.",
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where the shards go; must not exist")
    parser.add_argument("files", nargs="+", help="files, folders and patterns")
    parser.add_argument("--model", default="demo", help="whose tokenizer; default: demo")
    parser.add_argument("--text-key", default="text", help="the field of a record (default text)")
    parser.add_argument("--malformed", default="skip", choices=["skip", "error"])
    options = parser.parse_args(argv)
    path = resolve_model(None if options.model == "demo" else options.model)
    tokenizer = load_tokenizer(open_checkpoint(path))
    if tokenizer is None:
        raise ValueError(f"{path}: has no tokenizer")
    say = Metrics(options.folder.parent, is_main=True).say
    shards = tokenize(
        options.files, options.folder, tokenizer, options.text_key, options.malformed, say
    )
    say(f"{shards.tokens:,} tokens in {shards.documents:,} documents: {options.folder}")
    return 0
