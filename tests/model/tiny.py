"""Tiny random Qwen2 and Qwen3 checkpoints, written and run by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

_SHAPE = {
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,  # large, so that mistakes show in the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_checkpoint(
    folder: Path,
    architecture: str,
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    tie: bool = False,
    yarn: bool = False,
    sliding_window: int | None = None,
    max_window_layers: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """Save a random checkpoint into `folder` and return the transformers model in float32."""
    torch.manual_seed(7)
    options: dict[str, Any] = {
        **_SHAPE,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "tie_word_embeddings": tie,
        "use_sliding_window": sliding_window is not None,
        "sliding_window": sliding_window,
        "max_window_layers": max_window_layers,
        **changes,
    }
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn:
        options["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    if architecture == "qwen3":
        config, kind = Qwen3Config(head_dim=head_dim, **options), Qwen3ForCausalLM
    else:
        config, kind = Qwen2Config(**options), Qwen2ForCausalLM
    config._attn_implementation = "eager"
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
            parameter.copy_(parameter.to(dtype))
    model.to(dtype).save_pretrained(folder)
    return model.to(torch.float32).eval()


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]
