"""A tiny random model that reads bytes, and what trainers need around it."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from qwen_native.chat import ChatFormat
from qwen_native.config import ModelConfig
from qwen_native.nn import Qwen
from qwen_native.token_files import byte_tokenizer_json
from qwen_native.tokenizer import Tokenizer
from qwen_native.train.config import ModelOptions, OptimOptions, RunOptions
from qwen_native.train.metrics import read_metrics
from qwen_native.train.preference import ChatEncoder

MODEL = ModelOptions(path="unused", precision="fp32")


def model(
    seed: int = 0, *, spread: float = 1.0, kernels: str = "reference", **changes: Any
) -> Qwen:
    """A random model; `spread` scales its head, which bounds what adapters can say."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "architecture": "qwen2", "hidden_size": 48, "intermediate_size": 96, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 320,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_dim": 16,
        "max_position_embeddings": 256, "tie_word_embeddings": True, "qkv_bias": True,
        "qk_norm": False, "sliding_window": None, "max_window_layers": 2, "yarn": None,
        "use_dynamic_ntk": False, "use_logn_attn": False, "seq_length": 0,
    }  # fmt: skip
    made = Qwen(ModelConfig(**shape | changes), kernels)
    with torch.no_grad():
        made.head_weight.mul_(spread)
    return made


@functools.cache
def encoder() -> ChatEncoder:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
        tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return ChatEncoder(tokenizer, ChatFormat("qwen2"))


def optim(rate: float, **changes: Any) -> OptimOptions:
    return OptimOptions(rate, **{"schedule": "constant", "weight_decay": 0.0, **changes})


def run_options(folder: Path, steps: int, batch_size: int, **changes: Any) -> RunOptions:
    options = {"save_every": 0, "micro_batch_tokens": 1024, **changes}
    return RunOptions(str(folder), steps=steps, batch_size=batch_size, **options)


def metrics_of(folder: Path, name: str) -> list[float]:
    """One value of all steps."""
    return [line[name] for line in read_metrics(folder / "metrics.jsonl") if name in line]


def wide_model() -> Qwen:
    """A random model with a head of its own, in whose directions adapters can say anything.

    A hidden state of length sqrt(48) along a row of the head changes its logit by 2 to 3 standard
    deviations of the present ones.
    """
    return model(spread=16.0, tie_word_embeddings=False)


def on_one_side() -> torch.Tensor:
    """[vocab] bool: the tokens on one side of a plane through `wide_model`'s head, about half."""
    return wide_model().head_weight[:, 0] > 0
