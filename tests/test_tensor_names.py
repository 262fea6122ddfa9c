"""Expected tensors against transformers' own models; names of the other formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_config import QWEN, QWEN2
from tiny_models import SIZES
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwen_native.config import ModelConfig
from qwen_native.config_hf import config_from_hf
from qwen_native.errors import CheckpointError
from qwen_native.tensor_names import (
    GGUF_QWEN,
    GGUF_QWEN2,
    HF_QWEN,
    HF_QWEN2,
    SourceNames,
    canonical_tensors,
    expected_shapes,
)
from qwen_native.tensor_source import TensorSource


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("config_type", "model_type"),
    [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)],
)
def test_expected_shapes_are_those_of_transformers(
    config_type: type[Qwen2Config | Qwen3Config], model_type: type, tied: bool
) -> None:
    config = config_type(**SIZES, tie_word_embeddings=tied)
    with torch.device("meta"):
        state = model_type(config).state_dict()
    truth = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if tied:
        del truth["lm_head.weight"]
    assert expected_shapes(config_from_hf(config.to_dict())) == truth


@pytest.mark.parametrize(
    ("names", "canonical", "expected"),
    [
        (
            HF_QWEN2,
            "model.layers.3.mlp.up_proj.weight",
            ("model.layers.3.mlp.up_proj.weight", None),
        ),
        (HF_QWEN2, "lm_head.weight", ("lm_head.weight", None)),
        (HF_QWEN, "model.embed_tokens.weight", ("transformer.wte.weight", None)),
        (HF_QWEN, "model.norm.weight", ("transformer.ln_f.weight", None)),
        (HF_QWEN, "lm_head.weight", ("lm_head.weight", None)),
        (HF_QWEN, "model.layers.3.mlp.up_proj.weight", ("transformer.h.3.mlp.w1.weight", None)),
        (HF_QWEN, "model.layers.3.mlp.gate_proj.weight", ("transformer.h.3.mlp.w2.weight", None)),
        (
            HF_QWEN,
            "model.layers.31.self_attn.k_proj.bias",
            ("transformer.h.31.attn.c_attn.bias", "k"),
        ),
        (GGUF_QWEN, "model.layers.0.self_attn.v_proj.weight", ("blk.0.attn_qkv.weight", "v")),
        (GGUF_QWEN2, "model.layers.0.self_attn.v_proj.weight", ("blk.0.attn_v.weight", None)),
        (GGUF_QWEN2, "model.layers.0.self_attn.q_norm.weight", ("blk.0.attn_q_norm.weight", None)),
        (GGUF_QWEN2, "model.norm.weight", ("output_norm.weight", None)),
        (GGUF_QWEN2, "lm_head.weight", ("output.weight", None)),
    ],
)
def test_source_names(names: SourceNames, canonical: str, expected: tuple[str, str | None]) -> None:
    assert names.source(canonical) == expected


TINY = replace(
    QWEN2, hidden_size=8, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=4, rope_dim=4, vocab_size=5, max_window_layers=2,
)  # fmt: skip
TINY_QWEN = replace(
    QWEN, hidden_size=8, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=2,
    head_dim=4, rope_dim=4, vocab_size=5, max_window_layers=2,
)  # fmt: skip


def source(name: str, shape: tuple[int, ...], dtype: str = "F32", seed: int = 0) -> TensorSource:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return TensorSource(name, dtype, shape, values.reshape(-1).view(np.uint8), Path("a"))


def tiny(config: ModelConfig = TINY) -> dict[str, TensorSource]:
    return {name: source(name, shape) for name, shape in expected_shapes(config).items()}


def test_splits_a_fused_projection_without_copying() -> None:
    found: dict[str, TensorSource] = {}
    for canonical, shape in expected_shapes(TINY_QWEN).items():
        name, part = HF_QWEN.source(canonical)
        full = (24, *shape[1:]) if part else shape
        found.setdefault(name, source(name, full, seed=len(found)))
    tensors = canonical_tensors(found, TINY_QWEN, HF_QWEN)
    assert tensors.keys() == expected_shapes(TINY_QWEN).keys()
    for kind in ("weight", "bias"):
        fused = found[f"transformer.h.1.attn.c_attn.{kind}"]
        parts = [tensors[f"model.layers.1.self_attn.{p}_proj.{kind}"] for p in "qkv"]
        assert b"".join(p.data.tobytes() for p in parts) == fused.data.tobytes()
        assert all(np.shares_memory(p.data, fused.data) for p in parts)
        assert all(p.shape == (8, *fused.shape[1:]) for p in parts)


def test_ignores_buffers() -> None:
    found = tiny()
    for name in (
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.masked_bias",
        "transformer.h.0.attn.bias",
        "transformer.h.0.attn.logn_tensor",
        "transformer.rotary_emb.inv_freq",
    ):
        found[name] = source(name, (3,))
    assert canonical_tensors(found, TINY, HF_QWEN2).keys() == expected_shapes(TINY).keys()


def test_every_missing_tensor_is_named() -> None:
    for name in tiny():
        found = tiny()
        del found[name]
        with pytest.raises(CheckpointError) as error:
            canonical_tensors(found, TINY, HF_QWEN2)
        assert str(error.value) == f"tensor '{name}' is missing"


def test_every_wrong_shape_is_named() -> None:
    for name, shape in expected_shapes(TINY).items():
        for wrong in {(shape[0] + 1, *shape[1:]), shape[::-1], (*shape, 1)} - {shape}:
            found = tiny() | {name: source(name, wrong)}
            with pytest.raises(CheckpointError) as error:
                canonical_tensors(found, TINY, HF_QWEN2)
            assert f"tensor '{name}' has shape {wrong}, expected {shape}" in str(error.value)


def test_unknown_tensors_are_named() -> None:
    found = tiny() | {"model.layers.2.mlp.up_proj.weight": source("x", (6, 8))}
    with pytest.raises(CheckpointError, match="'model.layers.2.mlp.up_proj.weight' is not part"):
        canonical_tensors(found, TINY, HF_QWEN2)
    found["zzz"] = source("zzz", (1,))
    with pytest.raises(CheckpointError, match=r"nor are 1 more"):
        canonical_tensors(found, TINY, HF_QWEN2)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.norm.weight", "Q8_0"),
        ("model.layers.0.self_attn.q_proj.bias", "I32"),
        ("model.layers.0.mlp.up_proj.weight", "I32"),
        ("model.layers.0.mlp.up_proj.weight", "F64"),
        ("model.embed_tokens.weight", "F8_E4M3"),
    ],
)
def test_unsupported_types_are_named(name: str, dtype: str) -> None:
    found = tiny()
    found[name] = replace(found[name], dtype=dtype)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' has type {dtype}, expected"):
        canonical_tensors(found, TINY, HF_QWEN2)
