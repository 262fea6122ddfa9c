"""config.json against what transformers makes of the same values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from qwen_native.config import ModelConfig
from qwen_native.config_hf import config_from_hf
from qwen_native.errors import CheckpointError

QWEN2_JSON = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_JSON = QWEN2_JSON | {
    "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
    "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "max_position_embeddings": 40960, "sliding_window": None,
    "max_window_layers": 28, "rope_scaling": None,
}  # fmt: skip
QWEN_OLD_JSON = {
    "activation": "swiglu", "apply_residual_connection_post_layernorm": False,
    "architectures": ["QWenLMHeadModel"], "ffn_hidden_size": 22016, "kv_channels": 128,
    "layer_norm_epsilon": 1e-06, "model_type": "qwen", "n_embd": 4096, "n_head": 32,
    "n_layer": 32, "n_positions": 6144, "no_bias": True, "padded_vocab_size": 151936,
    "pos_emb": "rotary", "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True,
    "seq_length": 2048, "tie_word_embeddings": False, "use_dynamic_ntk": True,
    "use_logn_attn": True, "vocab_size": 151851,
}  # fmt: skip
QWEN_NEW_JSON = {
    "model_type": "qwen", "hidden_size": 5120, "intermediate_size": 27392, "kv_channels": 128,
    "layer_norm_epsilon": 1e-06, "max_position_embeddings": 8192, "no_bias": True,
    "num_attention_heads": 40, "num_hidden_layers": 40, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 2048,
    "tie_word_embeddings": False, "use_dynamic_ntk": True, "use_logn_attn": True,
    "vocab_size": 152064,
}  # fmt: skip


def hf_config(values: dict[str, Any]) -> Qwen2Config | Qwen3Config:
    """transformers' reading of the values; it edits nested dictionaries, so it gets a copy."""
    kind = Qwen2Config if values["model_type"] == "qwen2" else Qwen3Config
    return kind.from_dict(json.loads(json.dumps(values)))


def frequencies(config: ModelConfig) -> list[float]:
    """Rope frequencies of a config in float64, YaRN as arXiv 2309.00071 defines it."""
    d, base = config.rope_dim, config.rope_theta
    plain = [base ** (-2 * i / d) for i in range(d // 2)]
    yarn = config.yarn
    if yarn is None:
        return plain

    def dimension(rotations: float) -> float:
        ratio = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return d * math.log(ratio) / (2 * math.log(base))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), d - 1)
    result = []
    for i, frequency in enumerate(plain):
        ramp = min(max((i - low) / ((high - low) or 0.001), 0.0), 1.0)
        result.append(frequency / yarn.factor * ramp + frequency * (1 - ramp))
    return result


def assert_like_transformers(values: dict[str, Any]) -> ModelConfig:
    truth = hf_config(values)
    config = config_from_hf(values)
    assert config.architecture == truth.model_type
    assert config.hidden_size == truth.hidden_size
    assert config.intermediate_size == truth.intermediate_size
    assert config.num_layers == truth.num_hidden_layers
    assert config.num_heads == truth.num_attention_heads
    assert config.num_kv_heads == truth.num_key_value_heads
    head_dim = getattr(truth, "head_dim", truth.hidden_size // truth.num_attention_heads)
    assert config.head_dim == config.rope_dim == head_dim
    assert config.vocab_size == truth.vocab_size
    assert config.rms_norm_eps == truth.rms_norm_eps
    assert config.max_position_embeddings == truth.max_position_embeddings
    assert config.tie_word_embeddings == truth.tie_word_embeddings
    windows = [
        truth.sliding_window if kind == "sliding_attention" else None for kind in truth.layer_types
    ]
    assert [config.window(i) for i in range(config.num_layers)] == windows
    rotary = Qwen2RotaryEmbedding if truth.model_type == "qwen2" else Qwen3RotaryEmbedding
    embedding = rotary(truth)
    expected = torch.tensor(frequencies(config), dtype=torch.float64)
    # transformers computes in float32: a few rounding errors of 2^-24 each, relative.
    torch.testing.assert_close(embedding.inv_freq.double(), expected, rtol=1e-6, atol=0.0)
    scale = config.yarn.attention_factor if config.yarn else 1.0
    assert embedding.attention_scaling == pytest.approx(scale, rel=1e-12)
    return config


def test_reads_qwen2() -> None:
    config = assert_like_transformers(QWEN2_JSON)
    assert config.qkv_bias and not config.qk_norm
    assert (config.sliding_window, config.max_window_layers) == (None, 24)
    assert not (config.use_dynamic_ntk or config.use_logn_attn or config.seq_length)


def test_reads_qwen3() -> None:
    config = assert_like_transformers(QWEN3_JSON)
    assert config.qk_norm and not config.qkv_bias
    assert config.head_dim == 128 != config.hidden_size // config.num_heads
    without = {key: value for key, value in QWEN3_JSON.items() if key != "head_dim"}
    assert assert_like_transformers(without).head_dim == 128


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_reads_what_transformers_saves(kind: type[Qwen2Config | Qwen3Config]) -> None:
    saved = kind(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True, sliding_window=8,
        max_window_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip
    values = json.loads(saved.to_json_string())
    config = assert_like_transformers(values)
    assert config.rope_theta == 5e5
    assert (config.sliding_window, config.max_window_layers) == (8, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 24},
        {"use_sliding_window": True, "max_window_layers": 99},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": False, "sliding_window": 16},
        {
            "use_sliding_window": True,
            "layer_types": ["full_attention"] * 20 + ["sliding_attention"] * 4,
        },
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 24},
        {"layer_types": ["full_attention"] * 24},
    ],
)
def test_sliding_window_rule(change: dict[str, Any]) -> None:
    assert_like_transformers(QWEN2_JSON | change)


def test_absent_sliding_window_has_transformers_default() -> None:
    values = {k: v for k, v in QWEN2_JSON.items() if k != "sliding_window"}
    values["use_sliding_window"] = True
    assert assert_like_transformers(values).sliding_window == 4096


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.5}},
        {"rope_scaling": YARN, "max_position_embeddings": 131072},
        {"rope_scaling": YARN | {"factor": 8.0}, "max_position_embeddings": 131072},
        {"rope_scaling": YARN | {"attention_factor": 0.75}},
        {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2}},
        {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": 0}},
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}},
        {"rope_scaling": YARN | {"mscale": 0.7}},
        {"rope_scaling": YARN | {"original_max_position_embeddings": 64}},
        {"rope_scaling": YARN | {"factor": 1.0}},
        {"rope_scaling": YARN | {"rope_theta": 5e5}},
        {"rope_scaling": YARN, "original_max_position_embeddings": 16384},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}},
        {"rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 12345.0}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": YARN},
    ],
)
@pytest.mark.parametrize("base", [QWEN2_JSON, QWEN3_JSON], ids=["qwen2", "qwen3"])
def test_rope_scaling(base: dict[str, Any], change: dict[str, Any]) -> None:
    assert_like_transformers(base | change)


def test_yarn_null_factor_is_the_ratio_of_the_contexts() -> None:
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8192}
    values = QWEN2_JSON | {"rope_scaling": rope}
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](hf_config(values))
    config = config_from_hf(values)
    assert config.yarn is not None and config.yarn.factor == 4.0
    assert config.yarn.attention_factor == pytest.approx(scale, rel=1e-12)
    truth = torch.tensor(frequencies(config), dtype=torch.float64)
    torch.testing.assert_close(expected.double(), truth, rtol=1e-6, atol=0.0)


def test_reads_old_qwen_keys() -> None:
    config = config_from_hf(QWEN_OLD_JSON)
    assert config.architecture == "qwen"
    assert (config.hidden_size, config.num_layers, config.num_heads) == (4096, 32, 32)
    assert config.num_kv_heads == 32 and config.head_dim == config.rope_dim == 128
    assert config.intermediate_size == 11008
    assert config.vocab_size == 151936
    assert config.max_position_embeddings == 6144 and config.seq_length == 2048
    assert config.use_dynamic_ntk and config.use_logn_attn and config.qkv_bias
    assert not config.tie_word_embeddings


def test_reads_new_qwen_keys() -> None:
    config = config_from_hf(QWEN_NEW_JSON | {"use_logn_attn": False, "rotary_pct": 0.5})
    assert (config.hidden_size, config.num_layers, config.num_heads) == (5120, 40, 40)
    assert config.intermediate_size == 13696 and config.vocab_size == 152064
    assert config.rope_dim == 64 and config.head_dim == 128
    assert config.use_dynamic_ntk and not config.use_logn_attn


def test_reads_the_golden_qwen(golden: Path) -> None:
    values = json.loads((golden / "qwen1-tiny" / "config.json").read_text())
    config = config_from_hf(values)
    assert config.intermediate_size == 128 and config.seq_length == 64


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (QWEN2_JSON, {"model_type": None}, "model_type is missing"),
    (QWEN2_JSON, {"model_type": 7}, "model_type is 7"),
    (QWEN2_JSON, {"model_type": "llama"}, "model_type is 'llama', expected one of qwen, "),
    (QWEN2_JSON, {"model_type": "qwen2_moe"}, "mixture-of-experts"),
    (QWEN2_JSON, {"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
    (QWEN2_JSON, {"hidden_size": None}, "hidden_size is missing"),
    (QWEN2_JSON, {"hidden_size": "896"}, "hidden_size is '896'"),
    (QWEN2_JSON, {"hidden_size": 896.0}, "hidden_size is 896.0"),
    (QWEN2_JSON, {"hidden_size": -896}, "hidden_size is -896"),
    (QWEN2_JSON, {"hidden_size": 10**5000}, "hidden_size is a number of more than 4300 digits"),
    (QWEN2_JSON, {"hidden_size": 900}, "hidden size is 900"),
    (QWEN2_JSON, {"num_attention_heads": 0}, "number of heads 0"),
    (QWEN2_JSON, {"num_key_value_heads": 4}, "num_kv_heads is 4"),
    (QWEN2_JSON, {"num_hidden_layers": True}, "num_hidden_layers is True"),
    (QWEN2_JSON, {"num_hidden_layers": 1 << 39}, "num_layers is"),
    (QWEN2_JSON, {"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
    (QWEN2_JSON, {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    (QWEN2_JSON, {"rope_theta": 10**400}, "rope_theta is"),
    (QWEN2_JSON, {"rope_theta": 0}, "rope_theta is 0.0"),
    (QWEN2_JSON, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    (QWEN2_JSON, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    (QWEN2_JSON, {"attention_bias": False}, "attention_bias is False"),
    (QWEN3_JSON, {"attention_bias": True}, "attention_bias is True"),
    (QWEN2_JSON, {"mlp_bias": True}, "mlp_bias is True"),
    (QWEN2_JSON, {"use_mrope": True}, "use_mrope is True"),
    (QWEN3_JSON, {"num_experts": 128}, "num_experts is 128"),
    (QWEN2_JSON, {"dual_chunk_attention_config": {}}, "dual_chunk_attention_config is"),
    (QWEN2_JSON, {"rope_scaling": [1]}, "rope_scaling is [1]"),
    (QWEN2_JSON, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is 'linear'"),
    (QWEN2_JSON, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type is 'dynamic'"),
    (QWEN2_JSON, {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "mrope_section"),
    (QWEN2_JSON, {"rope_scaling": {"full_attention": {}}}, "key 'full_attention'"),
    (QWEN2_JSON, {"rope_scaling": YARN | {"truncate": False}}, "truncate is False"),
    (QWEN2_JSON, {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    (QWEN2_JSON, {"rope_scaling": {"type": "yarn"}}, "factor is missing"),
    (QWEN2_JSON, {"rope_scaling": YARN | {"factor": "4"}}, "factor is '4'"),
    (QWEN2_JSON, {"rope_scaling": YARN | {"factor": 0.5}}, "yarn factor is 0.5"),
    (QWEN2_JSON, {"rope_scaling": YARN | {"mscale": -9, "mscale_all_dim": 1}}, "mscale"),
    (
        QWEN2_JSON,
        {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
        "original_max_position_embeddings is 0",
    ),
    (QWEN2_JSON, {"layer_types": ["full_attention"]}, "layer_types is"),
    (QWEN2_JSON, {"layer_types": "full_attention"}, "layer_types is"),
    (QWEN2_JSON, {"layer_types": ["linear_attention"] * 24}, "layer_types is"),
    (QWEN2_JSON, {"layer_types": ["sliding_attention"] * 24}, "use_sliding_window"),
    (
        QWEN2_JSON,
        {
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
        },
        "full_attention layers followed by",
    ),
    (QWEN2_JSON, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
    (QWEN_NEW_JSON, {"no_bias": False}, "no_bias is False"),
    (QWEN_NEW_JSON, {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    (QWEN_NEW_JSON, {"kv_channels": 64}, "kv_channels is 64"),
    (QWEN_NEW_JSON, {"intermediate_size": 27393}, "is 27393, expected an even"),
    (QWEN_NEW_JSON, {"rotary_pct": 0.0}, "rotary_pct is 0.0"),
    (QWEN_NEW_JSON, {"rotary_pct": 1.5}, "rotary_pct is 1.5"),
    (QWEN_NEW_JSON, {"use_dynamic_ntk": None}, "use_dynamic_ntk is missing"),
    (QWEN_NEW_JSON, {"seq_length": None}, "seq_length is missing"),
    (QWEN_NEW_JSON, {"layer_norm_epsilon": None}, "layer_norm_epsilon is missing"),
    (QWEN_NEW_JSON, {"activation": "gelu"}, "activation is 'gelu'"),
]


@pytest.mark.parametrize(("base", "change", "message"), BAD)
def test_refuses(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        config_from_hf(base | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


NASTY = [
    None, True, False, 0, 1, 2, 3, -1, 64, 1 << 39, 1 << 70, 10**400, 10**5000, 0.0, 0.5, -1.0,
    1e308, float("inf"), float("nan"), "", "yarn", "default", "sliding_attention", [], [[]],
    [None], ["full_attention"], {}, {"type": "yarn"}, {"a": {"b": []}},
]  # fmt: skip
ROPE_KEYS = ["type", "rope_type", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
             "attention_factor", "original_max_position_embeddings", "rope_theta"]  # fmt: skip
BASES = [QWEN2_JSON, QWEN3_JSON, QWEN_OLD_JSON, QWEN_NEW_JSON]
KEYS = sorted(set().union(*BASES) | {"layer_types", "rope_parameters", "attention_bias"})


def builds_or_refuses(values: dict[str, Any]) -> None:
    try:
        config_from_hf(values)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


@pytest.mark.parametrize("base", BASES, ids=["qwen2", "qwen3", "old qwen", "new qwen"])
def test_every_nasty_value_gives_a_clean_error(base: dict[str, Any]) -> None:
    for value in NASTY:
        for key in KEYS:
            builds_or_refuses(base | {key: value, "use_sliding_window": True})
        for key in ROPE_KEYS:
            builds_or_refuses(base | {"rope_scaling": YARN | {key: value}})


@settings(max_examples=500, derandomize=True, deadline=2000, database=None)
@given(
    st.sampled_from(range(len(BASES))),
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(NASTY), max_size=3),
    st.dictionaries(st.sampled_from(ROPE_KEYS), st.sampled_from(NASTY), max_size=3),
)
def test_fuzzed_configs_give_clean_errors(
    base: int, change: dict[str, Any], rope: dict[str, Any]
) -> None:
    values = BASES[base] | change
    builds_or_refuses(values | {"rope_scaling": YARN | rope} if rope else values)
