"""What the trainer trains on: samples in a deterministic order that resumes anywhere.

A sample is a run of tokens with their targets and the documents in it. A source plans each step's
samples as a pure function of the step, so its position is the number of steps done.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from qwen_native.train.shards import DocumentStream, Shards

IGNORE = -100
"""The target of a token that does not count in the loss."""


@dataclass(frozen=True)
class Sample:
    """Tokens to train on.

    Attributes:
        tokens: [tokens], int64.
        targets: [tokens], int64: what each position should predict, or `IGNORE`.
        lengths: of the documents, which do not attend to each other; their sum is tokens.
    """

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    lengths: tuple[int, ...]

    @property
    def counted(self) -> int:
        """How many tokens count in the loss."""
        return int((self.targets != IGNORE).sum())


@dataclass(frozen=True)
class Batch:
    """Samples side by side on one token axis, as the model takes them.

    Attributes:
        tokens: [tokens], int64.
        positions: [tokens], int64, each document from 0.
        cu_seqlens: [documents + 1], int32.
        targets: [tokens], int64.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Batch:
        lengths = np.array([n for sample in samples for n in sample.lengths], dtype=np.int64)
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        return cls(
            torch.from_numpy(np.concatenate([sample.tokens for sample in samples])),
            torch.from_numpy(positions),
            torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
            torch.from_numpy(np.concatenate([sample.targets for sample in samples])),
        )

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.tokens.to(device),
            self.positions.to(device),
            self.cu_seqlens.to(device),
            self.targets.to(device),
        )


class Source(Protocol):
    """Where the trainer gets its samples from."""

    def step(self, index: int) -> Sequence[Sample]:
        """The samples of one step on all processes together, always the same for the same index."""
        ...

    def validation(self) -> Iterable[Sample]:
        """Held-out samples; may be none."""
        ...


class PackedText:
    """Pretraining: the stream of shuffled documents, cut into sequences of the context length.

    Every sequence has exactly `context` tokens, and the next token of each as target. Documents
    attend only to themselves unless `cross_documents`, as in the report; then the token after
    `<|endoftext|>` is a target, too. The sequences of each pass over the stream are shuffled, as a
    long document would otherwise fill whole batches.
    """

    def __init__(
        self,
        shards: Shards,
        context: int,
        batch_size: int,
        seed: int,
        cross_documents: bool = False,
        validation: Shards | None = None,
    ) -> None:
        self.stream = DocumentStream(shards, seed)
        self.context = context
        self.batch_size = batch_size
        self.cross_documents = cross_documents
        self._validation = validation
        self._per_pass = max(shards.tokens // context, 1)
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def _permute(self, index: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.stream.seed, 1, index]).permutation(self._per_pass)

    def step(self, index: int) -> list[Sample]:
        first = index * self.batch_size
        return [self.sample(i) for i in range(first, first + self.batch_size)]

    def validation(self) -> Iterable[Sample]:
        """The validation documents once, in sequences like those of the training."""
        if self._validation is None:
            return
        stream = DocumentStream(self._validation, 0)
        for begin in range(0, self._validation.tokens - 1, self.context):
            end = min(begin + self.context, self._validation.tokens - 1)
            yield self._cut(stream, begin, end)

    def sample(self, index: int) -> Sample:
        """The sequence in this place of the order."""
        whole, place = divmod(index, self._per_pass)
        begin = (whole * self._per_pass + int(self._permutation(whole)[place])) * self.context
        return self._cut(self.stream, begin, begin + self.context)

    def _cut(self, stream: DocumentStream, begin: int, end: int) -> Sample:
        """Tokens [begin, end) of the stream, and as targets the same one further."""
        pieces = stream.read(begin, end + 1)
        joined = np.concatenate([piece.tokens for piece in pieces])
        tokens, targets = joined[:-1], joined[1:].copy()
        if self.cross_documents:
            return Sample(tokens, targets, (len(tokens),))
        ends = np.cumsum([len(piece.tokens) for piece in pieces])
        finished = [e for e, p in zip(ends, pieces, strict=True) if p.ends_document]
        cuts = [int(e) for e in finished if e <= len(tokens)]
        targets[np.array(cuts, dtype=np.int64) - 1] = IGNORE
        bounds = [0, *cuts, *([len(tokens)] if not cuts or cuts[-1] < len(tokens) else [])]
        return Sample(tokens, targets, tuple(int(n) for n in np.diff(bounds)))


def micro_batches(
    samples: Sequence[Sample], limit: int, world_size: int = 1
) -> list[list[list[Sample]]]:
    """Deal a step's samples out to processes and cut each one's share to size.

    Args:
        samples: of the whole step.
        limit: most tokens of a micro-batch; a longer sample goes alone.
        world_size: processes; sample i goes to process i mod world_size.

    Returns:
        For each process its micro-batches; all have equally many, the last ones may be empty.
    """
    dealt = []
    for rank in range(world_size):
        groups: list[list[Sample]] = []
        size = 0
        for sample in samples[rank::world_size]:
            if not groups or size + len(sample.tokens) > limit:
                groups.append([])
                size = 0
            groups[-1].append(sample)
            size += len(sample.tokens)
        dealt.append(groups)
    most = max(len(groups) for groups in dealt)
    return [groups + [[]] * (most - len(groups)) for groups in dealt]
