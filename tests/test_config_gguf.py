"""GGUF metadata to ModelConfig."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_native.config import ModelConfig, YarnScaling
from qwen_native.config_gguf import config_from_gguf
from qwen_native.config_hf import config_from_hf
from qwen_native.errors import CheckpointError


def metadata(architecture: str, **values: Any) -> dict[str, Any]:
    prefixed = {f"{architecture}.{k.replace('__', '.')}": v for k, v in values.items()}
    return {"general.architecture": architecture} | prefixed


QWEN2 = metadata(
    "qwen2", block_count=24, context_length=32768, embedding_length=896,
    feed_forward_length=4864, attention__head_count=14, attention__head_count_kv=2,
    rope__freq_base=1e6, attention__layer_norm_rms_epsilon=float(np.float32(1e-6)),
)  # fmt: skip
QWEN3 = metadata(
    "qwen3", block_count=28, context_length=40960, embedding_length=1024,
    feed_forward_length=3072, attention__head_count=16, attention__head_count_kv=8,
    attention__key_length=128, attention__value_length=128, rope__freq_base=1e6,
    attention__layer_norm_rms_epsilon=1e-6,
)  # fmt: skip
QWEN = metadata(
    "qwen", block_count=32, context_length=32768, embedding_length=4096,
    feed_forward_length=22016, attention__head_count=32, rope__freq_base=10000.0,
    rope__dimension_count=128, attention__layer_norm_rms_epsilon=1e-6,
)  # fmt: skip


def build(values: dict[str, Any], tied: bool = False) -> ModelConfig:
    return config_from_gguf(values, vocab_size=151936, tie_word_embeddings=tied)


def test_qwen2_is_what_the_hf_config_gives() -> None:
    truth = config_from_hf(
        {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "rms_norm_eps": float(np.float32(1e-6)), "rope_theta": 1e6, "vocab_size": 151936,
            "max_position_embeddings": 32768, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    assert build(QWEN2, tied=True) == truth


def test_qwen3_is_what_the_hf_config_gives() -> None:
    truth = config_from_hf(
        {
            "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 151936,
            "max_position_embeddings": 40960, "tie_word_embeddings": False,
        }
    )  # fmt: skip
    assert build(QWEN3) == truth


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "context", "ntk", "seq_length"),
    [
        (2048, 24, 16, 8192, True, 8192),
        (4096, 32, 32, 32768, True, 8192),
        (4096, 32, 32, 8192, True, 8192),
        (4096, 32, 32, 6144, True, 2048),
        (5120, 40, 40, 8192, True, 2048),
        (8192, 80, 64, 32768, False, 32768),
        (256, 2, 4, 512, False, 512),
    ],
)
def test_qwen_gets_ntk_and_logn_by_its_released_size(
    hidden: int, layers: int, heads: int, context: int, ntk: bool, seq_length: int
) -> None:
    sizes = {
        "qwen.embedding_length": hidden,
        "qwen.block_count": layers,
        "qwen.attention.head_count": heads,
        "qwen.context_length": context,
        "qwen.rope.dimension_count": hidden // heads,
    }
    config = build(QWEN | sizes)
    assert config.use_dynamic_ntk is ntk and config.use_logn_attn is ntk
    assert config.seq_length == seq_length
    assert config.num_kv_heads == heads and config.qkv_bias
    assert config.intermediate_size == 11008  # half of feed_forward_length


def test_yarn() -> None:
    scaling = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 16384,
    }
    expected = YarnScaling(4.0, 16384, 1.1386294361119891, 32.0, 1.0)
    assert build(QWEN2 | scaling).yarn == expected
    betas = {"qwen2.rope.scaling.yarn_beta_fast": 16.0, "qwen2.rope.scaling.yarn_beta_slow": 2.0}
    changed = build(QWEN2 | scaling | betas).yarn
    assert changed is not None and (changed.beta_fast, changed.beta_slow) == (16.0, 2.0)
    assert build(QWEN2 | {"qwen2.rope.scaling.type": "none"}).yarn is None


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (QWEN2, {"general.architecture": "llama"}, "general.architecture is 'llama'"),
    (QWEN2, {"general.architecture": "qwen2moe"}, "mixture-of-experts"),
    (QWEN2, {"general.architecture": None}, "general.architecture is missing"),
    (QWEN2, {"general.architecture": np.zeros(3)}, "general.architecture is"),
    (QWEN2, {"general.architecture": "qwen3"}, "qwen3.embedding_length is missing"),
    (QWEN2, {"qwen2.block_count": "24"}, "qwen2.block_count is '24'"),
    (QWEN2, {"qwen2.block_count": np.arange(3)}, "qwen2.block_count is array"),
    (QWEN2, {"qwen2.attention.head_count": [14] * 24}, "qwen2.attention.head_count is"),
    (QWEN2, {"qwen2.attention.head_count": 0}, "number of heads 0"),
    (QWEN2, {"qwen2.rope.freq_base": float("nan")}, "qwen2.rope.freq_base is nan"),
    (QWEN2, {"qwen2.expert_count": 8}, "qwen2.expert_count is 8"),
    (QWEN2, {"qwen2.expert_count": np.ones(2)}, "qwen2.expert_count is array"),
    (QWEN2, {"qwen2.attention.sliding_window": 4096}, "sliding_window is 4096"),
    (QWEN2, {"qwen2.attention.value_length": 32}, "value_length is 32"),
    (QWEN2, {"qwen2.rope.scaling.type": "linear"}, "rope.scaling.type is 'linear'"),
    (QWEN2, {"qwen2.rope.scaling.factor": 2.0}, "rope.scaling.type is 'linear'"),
    (QWEN2, {"qwen2.rope.scaling.attn_factor": 0.5}, "attn_factor is 0.5"),
    (QWEN2, {"qwen2.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1"),
    (QWEN, {"qwen.feed_forward_length": 22017}, "feed_forward_length is 22017"),
    (QWEN2, {"qwen2.attention.layer_norm_rms_epsilon": None}, "rms_epsilon is missing"),
]


@pytest.mark.parametrize(("base", "change", "message"), BAD)
def test_refuses(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        build(base | change)
    assert message in str(error.value)


NASTY = [
    None, True, False, 0, 1, 2, 3, -1, 64, 1 << 39, (1 << 64) - 1, 0.0, 0.5, -1.0, 1e308,
    float("inf"), float("nan"), "", "yarn", "none", np.arange(2), np.zeros(0), [b"x"], [np.ones(1)],
]  # fmt: skip
BASES = [QWEN2, QWEN3, QWEN]
SUFFIXES = sorted(
    {key.split(".", 1)[1] for base in BASES for key in base if key != "general.architecture"}
    | {f"rope.scaling.{k}" for k in ("type", "factor", "attn_factor", "original_context_length")}
    | {"rope.scaling.yarn_beta_fast", "rope.scale_linear", "expert_count"}
)


def builds_or_refuses(base: dict[str, Any], change: dict[str, Any]) -> None:
    architecture = base["general.architecture"]
    try:
        build(base | {f"{architecture}.{key}": value for key, value in change.items()})
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize("base", BASES, ids=["qwen2", "qwen3", "qwen"])
def test_every_nasty_value_gives_a_clean_error(base: dict[str, Any]) -> None:
    for value in NASTY:
        for key in SUFFIXES:
            builds_or_refuses(base, {key: value})
            builds_or_refuses(base, {"rope.scaling.type": "yarn", key: value})


@settings(max_examples=500, derandomize=True, deadline=2000, database=None)
@given(
    st.sampled_from(range(len(BASES))),
    st.dictionaries(st.sampled_from(SUFFIXES), st.sampled_from(range(len(NASTY))), max_size=4),
)
def test_fuzzed_metadata_give_clean_errors(base: int, change: dict[str, int]) -> None:
    builds_or_refuses(BASES[base], {key: NASTY[i] for key, i in change.items()})
