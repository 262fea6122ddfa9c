"""`qwen-native train pretrain`: next-token prediction on documents, as in the report (§2.4, §4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_native.tokenizer import Tokenizer
from qwen_native.train.config import ModelOptions, OptimOptions, RunOptions, check_range
from qwen_native.train.data import PackedText
from qwen_native.train.distributed import World
from qwen_native.train.records import Report, expand, read_texts
from qwen_native.train.session import Plan, parse, run, section
from qwen_native.train.shards import Shards, write_shards

EXAMPLES = """
  qwen-native train pretrain recipes/pretrain_small.yaml
  qwen-native train pretrain recipes/pretrain_small.yaml run.steps=50 optim.learning_rate=1e-3
  qwen-native train pretrain recipes/pretrain_small.yaml --resume
  torchrun --nproc-per-node 8 -m qwen_native.train pretrain recipes/pretrain_7b.yaml"""


@section
@dataclass(frozen=True)
class TextOptions:
    """The documents.

    Attributes:
        context: tokens of a sequence.
        files: files, folders and patterns; tokenised into `run.folder`/shards at the first start.
            .jsonl, .json and .parquet hold records, every other file is one document.
        shards: instead: a folder that `qwen-native train tokenize` made.
        validation_files: held out, for evaluations.
        text_key: the field of a record that is its text.
        cross_documents: whether documents in one sequence attend to each other, as in the report.
        malformed: what to do about malformed records: report and "skip" them, or stop: "error".
    """

    context: int
    files: tuple[str, ...] = ()
    shards: str | None = None
    validation_files: tuple[str, ...] = ()
    text_key: str = "text"
    cross_documents: bool = False
    malformed: Literal["skip", "error"] = "skip"

    def __post_init__(self) -> None:
        check_range(self, context=(1, 1 << 24))
        if bool(self.files) == bool(self.shards):
            raise ValueError("data needs either files or shards")


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run."""

    model: ModelOptions
    data: TextOptions
    optim: OptimOptions
    run: RunOptions


def plan(
    config: PretrainConfig, tokenizer: Tokenizer, processes: World, say: Callable[[str], None]
) -> Plan:
    """Tokenise what is not yet, and pack it."""
    data, options = config.data, config.run
    folder = Path(data.shards or Path(options.folder) / "shards")
    validation = Path(options.folder) / "validation_shards"
    if processes.is_main:
        for patterns, target in ((data.files, folder), (data.validation_files, validation)):
            if patterns and not target.exists():
                tokenize(patterns, target, tokenizer, data.text_key, data.malformed, say)
    processes.barrier()
    shards = Shards(folder)
    shards.check_tokenizer(tokenizer)
    per_step = options.batch_size * data.context
    steps = options.steps or options.epochs * shards.tokens // per_step
    if steps < 1:
        raise ValueError(
            f"the data have {shards.tokens} tokens, fewer than one step of {per_step} needs"
        )
    say(f"{shards.tokens:,} tokens in {shards.documents:,} documents: {folder}")
    source = PackedText(
        shards,
        data.context,
        options.batch_size,
        options.seed,
        data.cross_documents,
        Shards(validation) if data.validation_files else None,
    )
    return Plan(source, steps, data.context)


def tokenize(
    patterns: Sequence[str],
    folder: Path,
    tokenizer: Tokenizer,
    text_key: str,
    malformed: str,
    say: Callable[[str], None],
) -> Shards:
    """Write token shards of files; what is malformed is said."""
    report = Report(strict=malformed == "error")
    texts = read_texts(expand(patterns), report, text_key)
    shards = write_shards(folder, texts, tokenizer, report)
    if report.malformed:
        say(report.summary())
    return shards


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    config, options = parse(
        PretrainConfig,
        argv,
        "pretrain",
        "Train a model on text, from scratch or further.",
        EXAMPLES,
    )
    return run(config, options, plan)
