"""`qwen-native train dpo`: direct preference optimisation.

Rafailov et al. 2023 (arXiv 2305.18290): pairs of answers, no reward model, no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen_native.nn import Qwen
from qwen_native.train import lora
from qwen_native.train.config import ModelOptions, OptimOptions, RunOptions, check_range
from qwen_native.train.data import Sample
from qwen_native.train.lora import LoraOptions, active_adapter
from qwen_native.train.objectives import dpo_loss
from qwen_native.train.preference import (
    PairOptions,
    PairTrainer,
    answer_log_probs,
    copy_of,
    plan,
)
from qwen_native.train.session import parse, run, section

EXAMPLES = """
  qwen-native train dpo recipes/dpo_demo_lora.yaml
  qwen-native train dpo recipes/dpo_demo_lora.yaml data.files=pairs.jsonl dpo.beta=0.05
  qwen-native train merge runs/dpo_demo/model demo merged
  torchrun --nproc-per-node 8 -m qwen_native.train dpo recipes/dpo_demo_lora.yaml \\
      model.kernels=reference"""


@section
@dataclass(frozen=True)
class DpoOptions:
    """The algorithm.

    Attributes:
        beta: how strongly the policy is held to the reference.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_range(self, beta=(1e-6, 1e3))


@dataclass(frozen=True)
class DpoConfig:
    """A DPO run. With `lora`, reference and policy share one frozen base."""

    model: ModelOptions
    data: PairOptions
    optim: OptimOptions
    run: RunOptions
    dpo: DpoOptions = DpoOptions()
    lora: LoraOptions | None = None


class DpoModel(nn.Module):
    """The policy and its reference.

    Attributes:
        policy: what is trained.
        reference: frozen; None = the policy's base without adapters.
        beta: see `DpoOptions`.
    """

    def __init__(self, policy: Qwen, reference: Qwen | None, beta: float) -> None:
        super().__init__()
        self.policy = policy
        self.reference = None if reference is None else reference.requires_grad_(False)
        self.beta = beta

    def pair_losses(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Loss and margin of each pair, [pairs]."""
        # First of all: FSDP expects a model's last forward pass to be the one of its backward pass.
        with torch.no_grad():
            if self.reference is not None:
                held = answer_log_probs(self.reference, samples)
            else:
                with active_adapter(self.policy, None):
                    held = answer_log_probs(self.policy, samples)
        chosen, rejected = answer_log_probs(self.policy, samples).reshape(-1, 2).unbind(1)
        held_chosen, held_rejected = held.reshape(-1, 2).unbind(1)
        return dpo_loss(chosen, rejected, held_chosen, held_rejected, self.beta)


def prepare(config: DpoConfig, model: Qwen, say: Callable[[str], None]) -> nn.Module:
    """Put the reference beside the policy: its own base, or a second copy of the model."""
    if config.lora is not None:
        lora.prepare_beside_reference(model, config.lora, say)
        return DpoModel(model, None, config.dpo.beta)
    return DpoModel(model, copy_of(model), config.dpo.beta)


def save(config: DpoConfig, model: nn.Module, folder: Path) -> None:
    """Write the policy, or its adapter."""
    assert isinstance(model, DpoModel)
    lora.save_policy(model.policy, folder, config.model.path or "")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    config, options = parse(
        DpoConfig, argv, "dpo", "Train a model on preference pairs directly.", EXAMPLES
    )
    return run(
        config, options, plan, prepare=prepare, trainer=PairTrainer, save=save,
        convert=lora.rounding(config.lora),
    )  # fmt: skip
