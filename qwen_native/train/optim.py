"""AdamW with float32 master parameters, gradient accumulation and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from qwen_native import ops
from qwen_native.train.config import OptimOptions


def learning_rate(options: OptimOptions, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule.

    The cosine reaches `final_ratio` of the peak at the last step.
    """
    warmup = options.warmup_steps or math.ceil(options.warmup_ratio * steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    if options.schedule == "constant":
        return options.learning_rate
    progress = (step - warmup + 1) / max(steps - warmup, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return options.learning_rate * (options.final_ratio + (1.0 - options.final_ratio) * cosine)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101), on matrices only, computed in float32.

    Parameters below float32 get a float32 master copy, from which they are rounded after each step.
    Between steps, gradients add up in `.grad`, or in float32 while `accumulate()` is in force.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], options: OptimOptions) -> None:
        """Take the trainable ones of named parameters; state is made at once."""
        self.options = options
        self.steps_done = 0
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        with torch.no_grad():
            self.master = {
                name: p.detach() if _is_wide(p) else p.detach().float()
                for name, p in self.parameters.items()
            }
            self.mean = {name: torch.zeros_like(p) for name, p in self.master.items()}
            self.square = {name: torch.zeros_like(p) for name, p in self.master.items()}
        self._sums: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def accumulate(self) -> None:
        """Until the next step, add the gradients of narrow parameters up in float32.

        Otherwise a step of several backward passes would round its sum to the parameters' type
        after each.
        """
        if self._hooks:
            return
        for name, parameter in self.parameters.items():
            if _is_wide(parameter):
                continue

            def move(parameter: Tensor, name: str = name) -> None:
                gradient = parameter.grad
                if gradient is None:
                    return
                if name in self._sums:
                    self._sums[name] += gradient
                else:
                    self._sums[name] = gradient.float()
                parameter.grad = None

            hook = parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def gradients(self) -> dict[str, Tensor]:
        """The present gradients by name, this process's part of each."""
        found = {}
        for name, parameter in self.parameters.items():
            gradient = self._sums.get(name, parameter.grad)
            if gradient is not None:
                found[name] = local(gradient)
        return found

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Euclidean norm of the whole gradient, over all processes when it is sharded."""
        squares = [_squared_norm(gradient) for gradient in self.gradients().values()]
        total = torch.tensor(sum(squares), dtype=torch.float64)
        if any(isinstance(p, DTensor) for p in self.parameters.values()):
            dist.all_reduce(total)
        return math.sqrt(float(total))

    @torch.no_grad()
    def step(self, rate: float) -> float:
        """Clip, update all parameters that have a gradient, forget the gradients.

        Returns:
            The gradient's norm before clipping. When it is not finite nothing is updated, but the
            step counts.
        """
        options = self.options
        norm = self.gradient_norm()
        self.steps_done += 1
        if math.isfinite(norm):
            clip = options.clip_norm
            scale = clip / norm if clip and norm > clip else 1.0
            for name, gradient in self.gradients().items():
                self._update(name, gradient, scale, rate)
        self._forget()
        return norm

    def _update(self, name: str, gradient: Tensor, scale: float, rate: float) -> None:
        parameter, master = self.parameters[name], local(self.master[name])
        decay = self.options.weight_decay if parameter.ndim >= 2 else 0.0
        if master.device.type == "cpu" and master.dtype == torch.float32:
            ops.adamw(
                master,
                local(self.mean[name]),
                local(self.square[name]),
                gradient.contiguous(),
                None if _is_wide(parameter) else local(parameter),
                step=self.steps_done,
                rate=rate,
                beta1=self.options.beta1,
                beta2=self.options.beta2,
                eps=self.options.eps,
                weight_decay=decay,
                grad_scale=scale,
            )
            return
        gradient = gradient.float()
        if scale != 1.0:
            gradient = gradient * scale
        adamw(
            [master],
            [gradient],
            [local(self.mean[name])],
            [local(self.square[name])],
            [],
            [torch.tensor(float(self.steps_done - 1))],
            fused=True,
            amsgrad=False,
            beta1=self.options.beta1,
            beta2=self.options.beta2,
            lr=rate,
            weight_decay=decay,
            eps=self.options.eps,
            maximize=False,
        )
        if not _is_wide(parameter):
            local(parameter).copy_(master)

    def _forget(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        self._sums.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def tensors(self) -> dict[str, Tensor]:
        """All state for a checkpoint: master parameters and moments, by name."""
        state: dict[str, Tensor] = {}
        for kind, values in (("m", self.mean), ("v", self.square), ("p", self.master)):
            state |= {f"{kind}.{name}": tensor for name, tensor in values.items()}
        return state

    @torch.no_grad()
    def restored(self, steps_done: int) -> None:
        """Adopt state that has been written into `tensors()`: round the parameters from it."""
        self.steps_done = steps_done
        for name, parameter in self.parameters.items():
            if not _is_wide(parameter):
                local(parameter).copy_(local(self.master[name]))


def _squared_norm(gradient: Tensor) -> float:
    if gradient.device.type == "cpu" and gradient.dtype in (torch.float32, torch.bfloat16):
        return ops.squared_norm(gradient.contiguous())
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2


def _is_wide(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.float32, torch.float64)


def count(parameters: Iterable[Tensor]) -> int:
    """Elements of all parameters together."""
    return sum(parameter.numel() for parameter in parameters)
