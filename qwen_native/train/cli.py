"""The commands of `qwen-native train`; each is a module with `main(argv)`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "pretrain": ("pretrain", "train on text, from scratch or further"),
    "sft": ("sft", "fine-tune on conversations, all parameters or adapters"),
    "reward": ("reward", "train a reward model on preference pairs"),
    "dpo": ("dpo", "train a model on preference pairs directly"),
    "ppo": ("ppo", "reinforcement learning with a reward model and a critic"),
    "grpo": ("grpo", "reinforcement learning with groups of answers and a verifier"),
    "merge": ("merge", "merge a LoRA adapter into its base model"),
    "export": ("export_run", "write a checkpoint as a Hugging Face folder"),
    "plot": ("plot", "draw the curves of runs as a PNG"),
    "tokenize": ("tokenize", "make token shards of text, JSON lines or parquet files"),
}
"""Command: module of this package, and what it does."""

_HELP = """usage: qwen-native train COMMAND [recipe.yaml] [key=value ...]

Train and align Qwen models. Each command explains itself with --help.

commands:
{commands}

examples:
  qwen-native train pretrain recipes/pretrain_small.yaml
  qwen-native train sft model.path=demo 'data.files=[chats.jsonl]' optim.learning_rate=1e-5 \\
      run.folder=runs/mine
  qwen-native train plot runs/mine
  qwen-native train pretrain --help
  torchrun --nproc-per-node 8 -m qwen_native.train pretrain recipes/pretrain_7b.yaml \\
      'data.files=[corpus/*.parquet]'
"""


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` names; returns its exit code.

    Raises:
        ValueError: there is no such command, or the extra `train` is not installed.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
        sys.stdout.write(_HELP.format(commands="\n".join(lines)))
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        raise ValueError(f"train: command is {name!r}, expected one of {', '.join(COMMANDS)}")
    try:
        module = importlib.import_module(f"qwen_native.train.{COMMANDS[name][0]}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"training needs the package {error.name}: pip install 'qwen_native[train]'"
        ) from error
    code: int = module.main(rest)
    return code
