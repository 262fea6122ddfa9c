"""The training loop: accumulation, clipping, schedule, metrics, checkpoints, resume."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen_native.nn import Qwen
from qwen_native.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from qwen_native.train.config import OptimOptions, RunOptions
from qwen_native.train.data import Batch, Sample, Source, micro_batches
from qwen_native.train.distributed import World
from qwen_native.train.metrics import Metrics
from qwen_native.train.optim import AdamW, learning_rate


@dataclass
class Progress:
    """What a checkpoint keeps beside tensors.

    Attributes:
        step: optimiser steps done; also the position in the data.
        tokens: tokens that went through the model so far.
        skipped: steps whose gradient was not finite, and which changed nothing.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0


class Trainer:
    """Trains a model on a source of samples with next-token cross-entropy.

    The loss of a step is the mean over all its counted tokens, however they are dealt out to
    micro-batches and processes.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        optim: OptimOptions,
        run: RunOptions,
        world: World,
        steps: int,
        micro_batch_tokens: int,
        metrics: Metrics,
    ) -> None:
        """Make the optimiser; `model` is already on its device and sharded where it should be."""
        self.model = model
        self.source = source
        self.optim = optim
        self.run = run
        self.world = world
        self.steps = steps
        self.micro_batch_tokens = micro_batch_tokens
        self.metrics = metrics
        self.folder = Path(run.folder)
        self.optimiser = AdamW(dict(model.named_parameters()), optim)
        self.progress = Progress()

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run's folder.

        Raises:
            ValueError: there is none, or it does not fit.
        """
        found = checkpoints(self.folder)
        if not found:
            raise ValueError(f"{self.folder}: has no checkpoint to resume from")
        values = load_checkpoint(found[-1][1], self.optimiser.tensors(), self.world)
        if values["steps"] != self.steps or values["batch_size"] != self.run.batch_size:
            raise ValueError(
                f"{found[-1][1]}: was made for {values['steps']} steps of batch size "
                f"{values['batch_size']}, not {self.steps} of {self.run.batch_size}"
            )
        if values["next_samples"] != digest(self.source.step(values["step"])):
            raise ValueError(
                f"{found[-1][1]}: the data that come next are not those of the run that wrote it; "
                "expected the same files, context, batch and seed"
            )
        self.progress = Progress(values["step"], values["tokens"], values["skipped"])
        self.optimiser.restored(self.progress.step)
        self.metrics.rewind(self.progress.step)

    def train(self) -> None:
        """Do the remaining steps; the last one is always evaluated and checkpointed."""
        run, progress = self.run, self.progress
        self.model.train()
        with self.metrics.showing(self.steps, progress.step):
            if run.eval_every and progress.step == 0:
                self._evaluate()
            while progress.step < self.steps:
                self._step()
                last = progress.step == self.steps
                if last or (run.eval_every and progress.step % run.eval_every == 0):
                    self._evaluate()
                if last or (run.save_every and progress.step % run.save_every == 0):
                    self.save()

    def save(self) -> None:
        """Write a checkpoint of the present state."""
        progress = self.progress
        values = {
            "steps": self.steps,
            "batch_size": self.run.batch_size,
            "tokens": progress.tokens,
            "skipped": progress.skipped,
            "next_samples": digest(self.source.step(progress.step)),
        }
        keep = self.run.keep_checkpoints
        tensors = self.optimiser.tensors()
        save_checkpoint(self.folder, progress.step, tensors, values, self.world, keep)

    def _step(self) -> None:
        begin = time.perf_counter()
        progress = self.progress
        samples = self.source.step(progress.step)
        counted = sum(sample.counted for sample in samples)
        shares = micro_batches(samples, self.micro_batch_tokens, self.world.size)
        mine = shares[self.world.rank]
        if len(mine) > 1:
            self.optimiser.accumulate()
        # FSDP averages gradients over the processes; the sum is wanted.
        weight = self.world.size / max(counted, 1)
        loss = torch.zeros((), dtype=torch.float64)
        for group in mine:
            part = self.loss_sum(group)
            (part * weight).backward()  # type: ignore[no-untyped-call]
            loss += part.detach().double().cpu()
        rate = learning_rate(self.optim, progress.step, self.steps)
        norm = self.optimiser.step(rate)
        progress.step += 1
        progress.skipped += not math.isfinite(norm)
        tokens = sum(len(sample.tokens) for sample in samples)
        progress.tokens += tokens
        self.metrics.step(
            step=progress.step,
            loss=float(self.world.total(loss)) / max(counted, 1),
            learning_rate=rate,
            gradient_norm=norm,
            tokens=progress.tokens,
            counted_tokens=counted,
            tokens_per_second=tokens / (time.perf_counter() - begin),
        )

    def loss_sum(self, samples: Sequence[Sample]) -> Tensor:
        """Summed cross-entropy of one micro-batch; 0, but with gradients, for an empty one.

        A process whose share is smaller has to take part in the exchange of gradients all the same.
        """
        if not samples:
            token = torch.zeros(1, dtype=torch.int64).numpy()
            samples = [Sample(token, token - 100, (1,))]
        batch = Batch.of(samples).to(self.world.device)
        loss: Tensor = self.model(
            batch.tokens, batch.positions, batch.cu_seqlens, targets=batch.targets
        )
        return loss

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Mean loss over the validation samples."""
        samples = list(self.source.validation())
        if not samples:
            return
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64)
        shares = micro_batches(samples, self.micro_batch_tokens, self.world.size)
        for group in shares[self.world.rank]:
            loss += self.loss_sum(group).double().cpu()
        self.model.train()
        counted = sum(sample.counted for sample in samples)
        mean = float(self.world.total(loss)) / max(counted, 1)
        self.metrics.evaluation(self.progress.step, mean)


def digest(samples: Sequence[Sample]) -> str:
    """A hash of all that the trainer sees of some samples."""
    state = hashlib.sha256()
    for sample in samples:
        state.update(repr(sample.lengths).encode())
        state.update(sample.tokens.astype("<i8").tobytes())
        state.update(sample.targets.astype("<i8").tobytes())
    return state.hexdigest()[:16]


def model_flops(model: Qwen, context: int) -> float:
    """Floating-point operations of training on one token: 6 per matrix element, and attention.

    Args:
        model: embeddings count only where they are the output matrix, too.
        context: tokens of a sequence, which attend to half of it on average.
    """
    config = model.config
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2)
    if not config.tie_word_embeddings:
        matrices -= config.vocab_size * config.hidden_size
    attention = config.num_layers * config.num_heads * config.head_dim * context * 2
    return 6.0 * matrices + 3.0 * attention
