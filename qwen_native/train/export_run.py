"""`qwen-native train export`: a Hugging Face folder of a checkpoint, while the run goes on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qwen_native.train.checkpoint import checkpoints, load_checkpoint
from qwen_native.train.config import ModelOptions, build
from qwen_native.train.distributed import World
from qwen_native.train.session import export, open_model, open_tokenizer

EXAMPLES = """
  qwen-native train export runs/pretrain_small small             the newest checkpoint
  qwen-native train export runs/pretrain_small small --step 200"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="qwen-native train export",
        description="Write a checkpoint of a pretraining or sft run as a Hugging Face folder.",
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("out", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--step", type=int, help="default: the newest")
    options = parser.parse_args(argv)
    export_checkpoint(options.run, options.out, options.step)
    sys.stdout.write(f"{options.out}\n")
    return 0


def export_checkpoint(run: Path, out: Path, step: int | None) -> None:
    """Write the parameters of a checkpoint, with the run's tokenizer and precision.

    Raises:
        ValueError: there is no such checkpoint, it is not that of a whole model, or `out` exists.
    """
    found = dict(checkpoints(run))
    if not found or step not in (None, *found):
        there = ", ".join(map(str, found)) or "none"
        raise ValueError(f"{run}: has no checkpoint of step {step}; those there are: {there}")
    if out.exists():
        raise ValueError(f"{out}: exists already, expected a new folder")
    path = found[max(found) if step is None else step]
    config: dict[str, Any] = json.loads((run / "config.json").read_bytes())
    if config.get("lora"):
        raise ValueError(f"{run}: trains an adapter, expected a run of all parameters")
    options = build(ModelOptions, config["model"], str(run / "config.json"))
    alone = World(0, 1, torch.device("cpu"), distributed=False)
    tokenizer, files = open_tokenizer(options, run, alone)
    context = config["data"]["context"]
    model = open_model(options, tokenizer, context, alone).float()
    # What the optimiser trains are the float32 masters.
    tensors = {f"p.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    load_checkpoint(path, tensors, alone)
    export(model, out, files, options.precision)
