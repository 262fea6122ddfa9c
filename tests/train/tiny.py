"""Tiny models, tokenizers and runs for the training tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import qwen_native
from qwen_native.nn import Qwen
from qwen_native.token_files import byte_tokenizer_json
from qwen_native.tokenizer import Tokenizer
from qwen_native.train.config import ModelOptions, OptimOptions, RunOptions, ShapeOptions
from qwen_native.train.distributed import World
from qwen_native.train.metrics import Metrics
from qwen_native.train.session import new_config
from qwen_native.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
ALONE = World(0, 1, torch.device("cpu"), distributed=False)
SHAPE = ShapeOptions(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2
)


def byte_tokenizer(folder: Path) -> Tokenizer:
    """The 256 bytes and the tokens of ChatML, as files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def tiny_model(
    tokenizer: Tokenizer, dtype: torch.dtype = torch.float32, context: int = 64, **options: Any
) -> Qwen:
    torch.manual_seed(3)
    made = ModelOptions(shape=SHAPE, tokenizer="bytes", **options)
    return Qwen(new_config(made, tokenizer, context), made.kernels).to(dtype)


def train(
    folder: Path,
    model: Qwen,
    source: Any,
    *,
    steps: int = 5,
    batch_size: int = 8,
    limit: int = 10**6,
    resume: bool = False,
    rate: float = 1e-2,
    **run: Any,
) -> Trainer:
    """Train a model in this process and return the trainer, whose metrics are in `folder`."""
    optim = OptimOptions(learning_rate=rate, warmup_steps=2)
    options = RunOptions(folder=str(folder), steps=steps, batch_size=batch_size, **run)
    metrics = Metrics(folder, is_main=True)
    trainer = Trainer(model, source, optim, options, ALONE, steps, limit, metrics)
    if resume:
        trainer.resume()
    trainer.train()
    return trainer


def losses(folder: Path) -> list[float]:
    """The loss of every step, as metrics.jsonl has it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def command(*arguments: str, processes: int = 0) -> list[str]:
    """A training command as a user starts it, under torchrun for several processes."""
    if not processes:
        return [sys.executable, "-m", "qwen_native.train", *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    counted = ["--nproc-per-node", str(processes), "-m", "qwen_native.train"]
    return [*launcher, *counted, *arguments]


def environment() -> dict[str, str]:
    """For commands that find the package where this process did, if their folder is another."""
    package = Path(qwen_native.__file__).parent.parent
    path = f"{package}:{os.environ.get('PYTHONPATH', '')}"
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run_command(*arguments: str, processes: int = 0) -> str:
    """Run a training command to its end; its standard error."""
    result = subprocess.run(
        command(*arguments, processes=processes),
        env=environment(), cwd=tempfile.gettempdir(), capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stderr
