"""`qwen-native train sft`: fine-tuning on conversations, as in the report (§3.1, §5).

The loss counts what assistants say and the token that ends their turn; the positions come from
writing the conversation, never from looking for token ids.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from qwen_native.chat import ChatFormat, TrainingText
from qwen_native.checkpoint import open_checkpoint
from qwen_native.hub import resolve_model
from qwen_native.nn import Qwen
from qwen_native.tokenizer import Tokenizer
from qwen_native.train import lora
from qwen_native.train.config import ModelOptions, OptimOptions, RunOptions, check_range
from qwen_native.train.data import IGNORE, Sample
from qwen_native.train.distributed import World
from qwen_native.train.lora import LoraOptions
from qwen_native.train.records import Message, Report, expand, read_chats
from qwen_native.train.session import Plan, parse, run, section

EXAMPLES = """
  qwen-native train sft recipes/sft_small.yaml
  qwen-native train sft recipes/sft.yaml model.path=./Qwen-7B 'data.files=[chats.jsonl]'
  qwen-native train sft recipes/sft_demo_lora.yaml
  qwen-native train sft recipes/sft_demo_lora.yaml lora.quantize=int4
  qwen-native train sft recipes/sft.yaml --estimate
  torchrun --nproc-per-node 8 -m qwen_native.train sft recipes/sft.yaml"""


@section
@dataclass(frozen=True)
class ChatOptions:
    """The conversations.

    Attributes:
        files: .jsonl, .json or .parquet with `messages` (OpenAI's form) or `conversations` (that
            of the original Qwen's finetune.py).
        context: most tokens of a conversation.
        validation_files: held out, for evaluations.
        pack: join conversations into sequences of up to `context` tokens. They do not see each
            other (see cross_documents), so that the result is that of one by one.
        cross_documents: let the conversations of a sequence attend to each other, as when they are
            packed without a mask.
        too_long: conversations beyond the context: leave them out and say so ("skip"), keep their
            first tokens ("truncate"), or stop ("error").
        malformed: what to do about malformed records: report and "skip" them, or stop: "error".
        system: the system message of conversations that have none; default: the model's own.
    """

    files: tuple[str, ...]
    context: int = 2048
    validation_files: tuple[str, ...] = ()
    pack: bool = True
    cross_documents: bool = False
    too_long: Literal["skip", "truncate", "error"] = "skip"
    malformed: Literal["skip", "error"] = "skip"
    system: str | None = None

    def __post_init__(self) -> None:
        check_range(self, context=(2, 1 << 24))


class TooLongError(ValueError):
    """A conversation does not fit into the context."""


@dataclass(frozen=True)
class SftConfig:
    """A fine-tuning run: of all parameters, or with `lora` of adapters, which it writes then."""

    model: ModelOptions
    data: ChatOptions
    optim: OptimOptions
    run: RunOptions
    lora: LoraOptions | None = None


def chat_format(options: ModelOptions) -> ChatFormat:
    """How the model's conversations are written."""
    if options.path is None:
        assert options.shape is not None
        return ChatFormat.for_checkpoint(options.shape.architecture)
    checkpoint = open_checkpoint(resolve_model(None if options.path == "demo" else options.path))
    return ChatFormat.for_checkpoint(
        checkpoint.config.architecture, checkpoint.chat_template, checkpoint.generation_config
    )


def encode_chats(
    data: ChatOptions,
    patterns: Sequence[str],
    chat: ChatFormat,
    tokenizer: Tokenizer,
    report: Report,
) -> list[TrainingText]:
    """Read and write out all conversations; what cannot be used goes into the report."""
    texts = []
    for where, messages in read_chats(expand(patterns), report):
        try:
            texts.append(_encode(messages, data, chat, tokenizer))
        except ValueError as error:
            if isinstance(error, TooLongError) and data.too_long == "error":
                raise ValueError(f"{where}: {error}") from error
            report.reject(where, str(error))
    if not texts:
        raise ValueError(f"no conversation to train on. {report.summary()}".strip())
    return texts


def _encode(
    messages: list[Message], data: ChatOptions, chat: ChatFormat, tokenizer: Tokenizer
) -> TrainingText:
    if data.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": data.system}, *messages]
    text = chat.render_training(tokenizer, messages)
    if len(text.token_ids) > data.context:
        if data.too_long != "truncate":
            raise TooLongError(
                f"has {len(text.token_ids)} tokens, more than data.context {data.context}"
            )
        text = TrainingText(text.token_ids[: data.context], text.trained[: data.context])
        if not any(text.trained):
            raise ValueError(f"has nothing to learn within data.context {data.context}")
    return text


def sample_of(text: TrainingText) -> Sample:
    """A conversation as tokens and targets: each position's target is the next token, if it counts.

    The last token predicts nothing and stays, so that the conversation is whole.
    """
    tokens = np.array(text.token_ids, dtype=np.int64)
    trained = np.array(text.trained)
    targets = np.full(len(tokens), IGNORE, dtype=np.int64)
    targets[:-1][trained[1:]] = tokens[1:][trained[1:]]
    return Sample(tokens, targets, (len(tokens),))


def joined(samples: Sequence[Sample], cross_documents: bool) -> Sample:
    """Several samples as one sequence."""
    tokens = np.concatenate([sample.tokens for sample in samples])
    targets = np.concatenate([sample.targets for sample in samples])
    lengths = tuple(n for sample in samples for n in sample.lengths)
    return Sample(tokens, targets, (len(tokens),) if cross_documents else lengths)


class Chats:
    """Batches of conversations, shuffled anew in each epoch; a pure function of the seed."""

    def __init__(
        self,
        texts: Sequence[TrainingText],
        validation: Sequence[TrainingText],
        data: ChatOptions,
        batch_size: int,
        seed: int,
    ) -> None:
        self.samples = [sample_of(text) for text in texts]
        self.held_out = [sample_of(text) for text in validation]
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def step(self, index: int) -> list[Sample]:
        first = index * self.batch_size
        chosen = [self.samples[self.place(i)] for i in range(first, first + self.batch_size)]
        return self._packed(chosen) if self.data.pack else chosen

    def place(self, position: int) -> int:
        """Which conversation stands at a position of the endless order."""
        epoch, within = divmod(position, len(self.samples))
        return int(self._order(epoch)[within])

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))

    def validation(self) -> Iterable[Sample]:
        return self.held_out

    def _packed(self, samples: Sequence[Sample]) -> list[Sample]:
        """Fill sequences of up to `context` tokens, longest first into the first that has room."""
        bins: list[list[Sample]] = []
        room: list[int] = []
        for sample in sorted(samples, key=lambda s: -len(s.tokens)):
            size = len(sample.tokens)
            place = next((i for i, free in enumerate(room) if free >= size), len(bins))
            if place == len(bins):
                bins.append([])
                room.append(self.data.context)
            bins[place].append(sample)
            room[place] -= size
        return [joined(group, self.data.cross_documents) for group in bins]


def describe(text: TrainingText, tokenizer: Tokenizer) -> str:
    """A conversation as the model sees it; what counts in the loss stands between ⟦ and ⟧."""
    parts = []
    begin = 0
    for i in range(1, len(text.token_ids) + 1):
        if i == len(text.token_ids) or text.trained[i] != text.trained[begin]:
            piece = tokenizer.decode(text.token_ids[begin:i], skip_special=False)
            parts.append(f"⟦{piece}⟧" if text.trained[begin] else piece)
            begin = i
    return "".join(parts)


def plan(
    config: SftConfig, tokenizer: Tokenizer, processes: World, say: Callable[[str], None]
) -> Plan:
    """Read the conversations and show the first one as it will be trained on."""
    data, options = config.data, config.run
    chat = chat_format(config.model)
    report = Report(strict=data.malformed == "error")
    texts = encode_chats(data, data.files, chat, tokenizer, report)
    held_out = (
        encode_chats(data, data.validation_files, chat, tokenizer, report)
        if data.validation_files
        else []
    )
    if report.malformed:
        say(report.summary())
    counted = sum(sum(text.trained) for text in texts)
    total = sum(len(text.token_ids) for text in texts)
    say(f"{len(texts):,} conversations, {total:,} tokens, of which {counted:,} count in the loss")
    say(f"the first one, what counts between ⟦ and ⟧:\n{describe(texts[0], tokenizer)}")
    source = Chats(texts, held_out, data, options.batch_size, options.seed)
    steps = options.steps or math.ceil(options.epochs * len(texts) / options.batch_size)
    return Plan(source, steps, data.context)


def prepare(config: SftConfig, model: Qwen, say: Callable[[str], None]) -> nn.Module:
    """Freeze the model and add the adapter."""
    assert config.lora is not None
    lora.prepare(model, config.lora, say)
    return model


def save(config: SftConfig, model: nn.Module, folder: Path) -> None:
    """Write the adapter."""
    assert isinstance(model, Qwen)
    lora.save_adapter(model, folder, base=config.model.path or "")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    config, options = parse(
        SftConfig, argv, "sft", "Fine-tune a model on conversations, whole or by LoRA.", EXAMPLES
    )
    if config.lora is None:
        return run(config, options, plan)
    convert = lora.rounding(config.lora)
    return run(config, options, plan, prepare=prepare, save=save, convert=convert)
