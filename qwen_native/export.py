"""Writes a trained model as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen_native.checkpoint import Checkpoint
from qwen_native.config import ModelConfig
from qwen_native.files import flush
from qwen_native.token_files import TOKENIZER_FILES, tokenizer_json_from_gguf

_SHARD_BYTES = 5 << 30
_WRITTEN_ANEW = ("quantization_config", "torch_dtype", "dtype", "tie_word_embeddings")


def save_folder(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, torch.Tensor],
    source: Checkpoint | None,
    tokenizer: Path | None = None,
) -> None:
    """Write config.json, the tensors and what `source` has beside them; see `Qwen.save`.

    Args:
        folder: must not exist, or be empty.
        config: the shape.
        state: the parameters by name.
        source: the checkpoint they came from, if any.
        tokenizer: a folder whose tokenizer files are copied instead of those of `source`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already, expected a new folder to write the model to")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
        _write_json(aside / "config.json", config_json(config, dtype, source))
        _write_tensors(aside, state)
        if tokenizer is not None:
            _copy_tokenizer(aside, tokenizer)
        elif source is not None:
            _write_tokenizer(aside, source)
        if source is not None:
            _write_companions(aside, source)
        for path in aside.iterdir():
            flush(path)
        aside.replace(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def config_json(config: ModelConfig, dtype: str, source: Checkpoint | None) -> dict[str, Any]:
    """The config.json of a model; that of `source` where it has one, without quantisation."""
    if source is not None and source.kind == "hf":
        kept = {k: v for k, v in source.metadata.items() if k not in _WRITTEN_ANEW}
        tied = {} if config.architecture == "qwen" else _tied(config)
        return kept | {"torch_dtype": dtype} | tied
    common: dict[str, Any] = {
        "model_type": config.architecture,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_position_embeddings,
    }
    if config.architecture == "qwen":
        return common | {
            "architectures": ["QWenLMHeadModel"],
            "intermediate_size": 2 * config.intermediate_size,
            "kv_channels": config.head_dim,
            "layer_norm_epsilon": config.rms_norm_eps,
            "rotary_emb_base": config.rope_theta,
            "rotary_pct": config.rope_dim / config.head_dim,
            "seq_length": config.seq_length,
            "use_dynamic_ntk": config.use_dynamic_ntk,
            "use_logn_attn": config.use_logn_attn,
            "no_bias": True,
            "tie_word_embeddings": False,
        }
    name = config.architecture.capitalize()
    windowed = config.sliding_window is not None
    result = common | {
        "architectures": [f"{name}ForCausalLM"],
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "use_sliding_window": windowed,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.max_window_layers,
    }
    if config.yarn is not None:
        yarn = config.yarn
        result["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "attention_factor": yarn.attention_factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        }
    return result | _tied(config)


def _tied(config: ModelConfig) -> dict[str, bool]:
    return {"tie_word_embeddings": config.tie_word_embeddings}


def _write_tensors(folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    """One model.safetensors, or numbered shards of at most 5 GB with their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = _SHARD_BYTES
    for name, tensor in state.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = _SHARD_BYTES
        shards[-1][name] = tensor.detach().cpu().contiguous()
        room -= tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": places},
    )


def _write_tokenizer(folder: Path, source: Checkpoint) -> None:
    if source.kind == "gguf":
        _write_json(folder / "tokenizer.json", tokenizer_json_from_gguf(source.metadata))
    else:
        _copy_tokenizer(folder, source.path)


def _copy_tokenizer(folder: Path, source: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _write_companions(folder: Path, source: Checkpoint) -> None:
    """Chat template and generation config."""
    if source.chat_template is not None:
        (folder / "chat_template.jinja").write_text(source.chat_template, encoding="utf-8")
    if source.generation_config:
        _write_json(folder / "generation_config.json", source.generation_config)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
