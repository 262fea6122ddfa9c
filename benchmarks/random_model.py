"""A checkpoint of a real model's shape with random weights, for speed does not depend on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from qwen_native.hub import cache_folder, resolve_model

# Qwen-1.8B (hidden 2048, 24 layers, 16 heads of 128, ffn 5504), held as "qwen2", which every engine
# loads; its matrices are the same but for q, k and v lying apart.
SHAPES = {"1.8b": {"hidden": 2048, "inter": 5504, "layers": 24, "heads": 16, "kv_heads": 16}}


def random_model(shape: str) -> Path:
    """A Q8_0 GGUF file of SHAPES[shape] in our cache, with the demo model's vocabulary."""
    target = cache_folder() / f"random-{shape}.gguf"
    if target.exists():
        return target
    s = SHAPES[shape]
    hidden, inter = s["hidden"], s["inter"]
    source = GGUFReader(resolve_model(None))
    partial = target.with_suffix(".part")
    writer = GGUFWriter(partial, "qwen2")
    for field in source.fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        value, kind = field.contents(), field.types[0]
        inner = field.types[1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type=inner)
    vocab = next(t for t in source.tensors if t.name == "token_embd.weight").shape[1]
    writer.add_block_count(s["layers"])
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inter)
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)

    rng = np.random.default_rng(18)

    def matrix(name: str, rows: int, cols: int) -> None:
        blocks = rng.integers(-64, 64, (rows, cols // 32, 34), dtype=np.int8).view(np.uint8)
        scale = np.array([1 / (37 * cols**0.5)], np.float16)  # outputs as large as inputs
        blocks[:, :, :2] = scale.view(np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=GGMLQuantizationType.Q8_0)

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, np.float32))

    kv = hidden // s["heads"] * s["kv_heads"]
    matrix("token_embd.weight", int(vocab), hidden)
    for i in range(s["layers"]):
        layer = f"blk.{i}."
        vector(layer + "attn_norm.weight", hidden, 1)
        vector(layer + "ffn_norm.weight", hidden, 1)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            matrix(f"{layer}attn_{name}.weight", rows, hidden)
            vector(f"{layer}attn_{name}.bias", rows, 0)
        matrix(layer + "attn_output.weight", hidden, hidden)
        matrix(layer + "ffn_gate.weight", inter, hidden)
        matrix(layer + "ffn_up.weight", inter, hidden)
        matrix(layer + "ffn_down.weight", hidden, inter)
    vector("output_norm.weight", hidden, 1)
    matrix("output.weight", int(vocab), hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(target)
