"""`qwen-native train reward`: a reward model from preference pairs (the report's §3.2.1).

Preference-model pretraining on large, noisy comparisons and fine-tuning on better ones are the same
training on different data: run it twice, the second time from the first one's result. The reward is
a linear function of the hidden state at the answer's end token; the loss is pairwise logistic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qwen_native.nn import Qwen
from qwen_native.train.config import ModelOptions, OptimOptions, RunOptions
from qwen_native.train.preference import PairOptions, PairTrainer, plan
from qwen_native.train.scalar import ScalarModel, load_head
from qwen_native.train.session import parse, run

EXAMPLES = """
  qwen-native train reward recipes/reward_demo.yaml
  qwen-native train reward recipes/reward_7b.yaml run.folder=runs/pmp data.files=noisy.jsonl
  qwen-native train reward recipes/reward_7b.yaml model.path=runs/pmp/model data.files=ours.jsonl
  torchrun --nproc-per-node 8 -m qwen_native.train reward recipes/reward_7b.yaml"""


@dataclass(frozen=True)
class RewardConfig:
    """A reward model's training. `model.path` may be a reward model: then its head is kept."""

    model: ModelOptions
    data: PairOptions
    optim: OptimOptions
    run: RunOptions


def prepare(config: RewardConfig, model: Qwen, say: Callable[[str], None]) -> nn.Module:
    """Put a head on the model: that of the checkpoint if it has one."""
    result = ScalarModel(model)
    if config.model.path is not None and load_head(result, Path(config.model.path)):
        say(f"going on from the reward model {config.model.path}")
    return result


def save(config: RewardConfig, model: nn.Module, folder: Path) -> None:
    """Write the reward model."""
    assert isinstance(model, ScalarModel)
    model.save(folder)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    config, options = parse(
        RewardConfig, argv, "reward", "Train a reward model on preference pairs.", EXAMPLES
    )
    return run(config, options, plan, prepare=prepare, trainer=PairTrainer, save=save)
