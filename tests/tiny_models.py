"""Small random checkpoints, written by transformers and by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwen_native.gguf import BLOCKS

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 80, "max_position_embeddings": 128,
}  # fmt: skip


def save_hf(folder: Path, kind: str, max_shard_size: str = "5GB", **changes: Any) -> dict[str, Any]:
    """Save a random Qwen2 or Qwen3 model as a folder; its state_dict without tied copies."""
    torch.manual_seed(0)
    config_type, model_type = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    model = model_type(config_type(**(SIZES | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


GGUF_HIDDEN, GGUF_INTER, GGUF_HEADS, GGUF_KV_HEADS, GGUF_VOCAB = 256, 512, 4, 2, 6


def gguf_shapes(architecture: str, layers: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and row-major shapes that llama.cpp's converter gives to a model of this kind."""
    h, f, kv = GGUF_HIDDEN, GGUF_INTER, GGUF_KV_HEADS * GGUF_HIDDEN // GGUF_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (GGUF_VOCAB, h)}
    for i in range(layers):
        layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (h,), "ffn_norm.weight": (h,)}
        if architecture == "qwen":
            layer |= {"attn_qkv.weight": (3 * h, h), "attn_qkv.bias": (3 * h,)}
        else:
            layer |= {"attn_q.weight": (h, h), "attn_k.weight": (kv, h), "attn_v.weight": (kv, h)}
        if architecture == "qwen2":
            layer |= {"attn_q.bias": (h,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if architecture == "qwen3":
            head_dim = h // GGUF_HEADS
            layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
        layer |= {"attn_output.weight": (h, h), "ffn_down.weight": (h, f)}
        layer |= {"ffn_gate.weight": (f, h), "ffn_up.weight": (f, h)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    shapes["output_norm.weight"] = (h,)
    if not tied:
        shapes["output.weight"] = (GGUF_VOCAB, h)
    return shapes


def save_gguf(
    path: Path,
    architecture: str,
    *,
    layers: int = 2,
    tied: bool = False,
    changes: dict[str, tuple[int, ...] | None] | None = None,
    metadata: dict[str, Any] | None = None,
) -> dict[str, tuple[str, bytes]]:
    """Save a random model, its matrices in all tensor types in turn.

    `changes` gives tensors another shape or, with None, leaves them out; `metadata` adds or
    replaces keys. Returns type and bytes of each tensor by name.
    """
    rng = np.random.default_rng(7)
    writer = GGUFWriter(path, architecture)
    values: dict[str, Any] = {
        f"{architecture}.block_count": layers,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": GGUF_HIDDEN,
        f"{architecture}.feed_forward_length": GGUF_INTER * (2 if architecture == "qwen" else 1),
        f"{architecture}.attention.head_count": GGUF_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{architecture}.rope.freq_base": 10000.0,
    }
    if architecture != "qwen":
        values[f"{architecture}.attention.head_count_kv"] = GGUF_KV_HEADS
    for key, value in (values | (metadata or {})).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)

    types = list(BLOCKS)
    contents = {}
    shapes: dict[str, Any] = gguf_shapes(architecture, layers, tied) | (changes or {})
    for i, (name, shape) in enumerate(shapes.items()):
        if shape is None:
            continue
        dtype = "F32" if len(shape) == 1 else types[i % len(types)]
        block, block_bytes = BLOCKS[dtype]
        row_bytes = shape[-1] // block * block_bytes
        raw = rng.integers(0, 256, (*shape[:-1], row_bytes), dtype=np.uint8)
        contents[name] = (dtype, raw.tobytes())
        if dtype in ("F32", "F16"):
            writer.add_tensor(name, raw.view(np.float32 if dtype == "F32" else np.float16))
        else:
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return contents
