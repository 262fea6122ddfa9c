"""Preference pairs as the trainer takes them, for reward models and DPO."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_native.chat import ChatFormat
from qwen_native.checkpoint import open_checkpoint
from qwen_native.hub import resolve_model
from qwen_native.nn import KERNELS, Qwen
from qwen_native.tokenizer import Tokenizer
from qwen_native.train.config import ModelOptions, check_range
from qwen_native.train.data import IGNORE, Batch, Sample, micro_batches
from qwen_native.train.distributed import World
from qwen_native.train.records import Pair, Report, expand, read_pairs
from qwen_native.train.session import Config, Plan, section
from qwen_native.train.trainer import Trainer


@section
@dataclass(frozen=True)
class PairOptions:
    """Preference pairs.

    Attributes:
        files: .jsonl, .json and .parquet with `prompt`, `chosen` and `rejected`.
        validation_files: held out, for evaluations.
        context: most tokens of a prompt and one of its answers.
        malformed: what to do about malformed records: report and "skip" them, or stop: "error".
    """

    files: tuple[str, ...]
    validation_files: tuple[str, ...] = ()
    context: int = 2048
    malformed: Literal["skip", "error"] = "skip"

    def __post_init__(self) -> None:
        check_range(self, context=(2, 1 << 24))


class PairSample(Sample):
    """Two documents, the better answer first; counts as one in the mean of a step's losses."""

    @property
    def counted(self) -> int:
        return 1


def answer_sample(prompt: Sequence[int], answer: Sequence[int]) -> Sample:
    """One document whose targets are the tokens of the answer."""
    tokens = np.array([*prompt, *answer], np.int64)
    targets = np.full_like(tokens, IGNORE)
    targets[len(prompt) - 1 : -1] = tokens[len(prompt) :]
    return Sample(tokens, targets, (len(tokens),))


def pair_sample(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]
) -> PairSample:
    """A prompt with its better and its worse answer, all token ids."""
    better, worse = answer_sample(prompt, chosen), answer_sample(prompt, rejected)
    return PairSample(
        np.concatenate([better.tokens, worse.tokens]),
        np.concatenate([better.targets, worse.targets]),
        better.lengths + worse.lengths,
    )


@dataclass(frozen=True)
class ChatEncoder:
    """Turns messages into the token ids of a checkpoint.

    Attributes:
        tokenizer: of the checkpoint.
        chat_format: of the checkpoint.
    """

    tokenizer: Tokenizer
    chat_format: ChatFormat

    @classmethod
    def of(cls, options: ModelOptions, tokenizer: Tokenizer) -> ChatEncoder:
        """The encoder of the model that the options name."""
        if options.shape is not None:
            return cls(tokenizer, ChatFormat.for_checkpoint(options.shape.architecture))
        path = None if options.path == "demo" else options.path
        checkpoint = open_checkpoint(resolve_model(path))
        found = ChatFormat.for_checkpoint(
            checkpoint.config.architecture, checkpoint.chat_template, checkpoint.generation_config
        )
        return cls(tokenizer, found)

    def prompt(self, messages: Sequence[dict[str, object]]) -> list[int]:
        """The ids of a chat up to where the assistant answers."""
        return self.chat_format.render(self.tokenizer, messages).token_ids

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.chat_format.stop_ids(self.tokenizer)

    def answer(self, text: str) -> list[int]:
        """The ids of an answer and its end token."""
        return [*self.tokenizer.encode(text), self.tokenizer.im_end]

    def pair(self, pair: Pair) -> PairSample:
        """The sample of a preference pair."""
        return pair_sample(
            self.prompt(pair.prompt), self.answer(pair.chosen), self.answer(pair.rejected)
        )


def read_pair_samples(
    files: Sequence[Path], encoder: ChatEncoder, context: int, report: Report
) -> list[PairSample]:
    """Read and encode preference pairs; those with an answer that does not fit are rejected."""
    samples = []
    for where, pair in read_pairs(files, report):
        sample = encoder.pair(pair)
        if max(sample.lengths) > context:
            report.reject(where, f"has {max(sample.lengths)} tokens, expected at most {context}")
        else:
            samples.append(sample)
    return samples


class PairConfig(Config, Protocol):
    """What the configurations of reward models and DPO have."""

    @property
    def data(self) -> PairOptions: ...


def plan(
    config: PairConfig, tokenizer: Tokenizer, processes: World, say: Callable[[str], None]
) -> Plan:
    """Read the pairs; steps and order of the training on them."""
    data, run = config.data, config.run
    encoder = ChatEncoder.of(config.model, tokenizer)
    sets = []
    for patterns in (data.files, data.validation_files):
        report = Report(strict=data.malformed == "error")
        files = expand(patterns) if patterns else []
        sets.append(read_pair_samples(files, encoder, data.context, report))
        if report.malformed:
            say(report.summary())
    source = ShuffledSamples(sets[0], run.batch_size, run.seed, sets[1])
    say(f"{len(sets[0])} preference pairs, {len(sets[1])} held out")
    # A sample holds both answers.
    return Plan(source, run.steps or source.steps(run.epochs), 2 * data.context)


class ShuffledSamples:
    """A list of samples, gone through in another order each epoch; a pure function of the step."""

    def __init__(
        self,
        samples: Sequence[Sample],
        batch_size: int,
        seed: int,
        validation: Sequence[Sample] = (),
    ) -> None:
        """
        Raises:
            ValueError: there are no samples.
        """
        if not samples:
            raise ValueError("there are no samples to train on")
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self._validation = validation

    def steps(self, epochs: int) -> int:
        """Steps that go through all samples `epochs` times."""
        return -(-len(self.samples) * epochs // self.batch_size)

    def step(self, index: int) -> list[Sample]:
        return [
            self.samples[i] for i in shuffled(len(self.samples), self.batch_size, self.seed, index)
        ]

    def validation(self) -> Iterable[Sample]:
        return self._validation


def shuffled(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The numbers below `count` that belong to a step; each epoch is a permutation of all."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_permutation(count, seed, p // count)[p % count]) for p in positions]


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@runtime_checkable
class PairModel(Protocol):
    """What preference pairs train."""

    def pair_losses(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Loss and margin of each pair, [pairs]."""
        ...


class PairTrainer(Trainer):
    """Trains a `PairModel`.

    A step's loss is the mean over its pairs. The evaluation says loss, accuracy (the share of pairs
    with a positive margin) and mean margin.
    """

    def loss_sum(self, samples: Sequence[Sample]) -> Tensor:
        return self._pair_losses(samples)[0].sum()

    def _pair_losses(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Loss and margin of each pair; empty, but with gradients, when there are no samples.

        A process whose share is smaller has to take part in the exchanges all the same.
        """
        model: Any = self.model
        assert isinstance(model, PairModel)
        losses, margins = model.pair_losses(samples or [pair_sample([0], [0], [0])])
        return (losses, margins) if samples else (losses[:0], margins[:0])

    @torch.no_grad()
    def _evaluate(self) -> None:
        samples = list(self.source.validation())
        if not samples:
            return
        self.model.eval()
        groups = micro_batches(samples, self.micro_batch_tokens, self.world.size)[self.world.rank]
        parts = [self._pair_losses(group) for group in groups]
        self.model.train()
        mine = [torch.cat(values).tolist() for values in zip(*parts, strict=True)]
        everyone = self.world.gather(mine)
        losses, margins = (torch.tensor([v for m in everyone for v in m[i]]) for i in (0, 1))
        accuracy, margin = float((margins > 0).float().mean()), float(margins.mean())
        self.metrics.evaluation(
            self.progress.step, float(losses.mean()), accuracy=accuracy, margin=margin
        )


def copy_of(model: Qwen) -> Qwen:
    """Another model with the same parameters."""
    kernels = next(name for name, path in KERNELS.items() if path == model.kernels.__name__)
    with torch.device("meta"):
        twin = Qwen(model.config, kernels)
    weight = model.embedding.weight
    twin.to(weight.dtype).to_empty(device=weight.device)
    twin.load_state_dict(model.state_dict())
    twin.source = model.source
    twin.activation_checkpointing = model.activation_checkpointing
    return twin


def target_log_probs(model: Qwen, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the samples' targets.

    Returns:
        [counted] float32, in order, and [counted] int64, the document that each belongs to.
    """
    batch = Batch.of(samples).to(model.head_weight.device)
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)
    rows = (batch.targets != IGNORE).nonzero().squeeze(1)
    log_probs: Tensor = model.kernels.linear_log_prob(
        hidden[rows], model.head_weight, batch.targets[rows]
    )
    documents = torch.bucketize(rows, batch.cu_seqlens[1:].long(), right=True)
    return log_probs, documents


def answer_log_probs(model: Qwen, samples: Sequence[Sample]) -> Tensor:
    """Summed log-probability of each document's targets, [documents] float32."""
    log_probs, documents = target_log_probs(model, samples)
    total = torch.zeros(sum(len(s.lengths) for s in samples), device=log_probs.device)
    return total.index_add(0, documents, log_probs.float())
