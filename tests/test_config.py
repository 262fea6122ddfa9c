"""ModelConfig checks itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from qwen_native.config import ModelConfig, YarnScaling, yarn_attention_factor
from qwen_native.errors import CheckpointError

YARN = YarnScaling(4.0, 32768, 1.0, 32.0, 1.0)
QWEN2 = ModelConfig(
    architecture="qwen2", hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14,
    num_kv_heads=2, head_dim=64, vocab_size=151936, rms_norm_eps=1e-6, rope_theta=1e6, rope_dim=64,
    max_position_embeddings=32768, tie_word_embeddings=True, qkv_bias=True, qk_norm=False,
    sliding_window=None, max_window_layers=24, yarn=None, use_dynamic_ntk=False,
    use_logn_attn=False, seq_length=0,
)  # fmt: skip
QWEN = dataclasses.replace(
    QWEN2,
    architecture="qwen",
    num_kv_heads=14,
    tie_word_embeddings=False,
    use_dynamic_ntk=True,
    use_logn_attn=True,
    seq_length=2048,
)

BAD: list[tuple[ModelConfig, dict[str, Any], str]] = [
    (QWEN2, {"architecture": "llama"}, "architecture is 'llama'"),
    (QWEN2, {"hidden_size": 0}, "hidden_size is 0"),
    (QWEN2, {"hidden_size": 896.0}, "hidden_size is 896.0"),
    (QWEN2, {"num_layers": True}, "num_layers is True"),
    (QWEN2, {"num_layers": 10**9}, "num_layers is 1000000000"),
    (QWEN2, {"vocab_size": 1 << 60}, "vocab_size is"),
    (QWEN2, {"num_kv_heads": 3}, "num_kv_heads is 3, expected a divisor of num_heads 14"),
    (QWEN2, {"num_kv_heads": 28}, "num_kv_heads is 28"),
    (QWEN2, {"head_dim": 65}, "head_dim is 65, expected an even"),
    (QWEN2, {"rope_dim": 66}, "rope_dim is 66"),
    (QWEN2, {"rope_dim": 31}, "rope_dim is 31"),
    (QWEN2, {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
    (QWEN2, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    (QWEN2, {"rope_theta": float("inf")}, "rope_theta is inf"),
    (QWEN2, {"rope_theta": 1.0}, "rope_theta is 1.0"),
    (QWEN2, {"qkv_bias": 1}, "qkv_bias is 1"),
    (QWEN2, {"sliding_window": 0}, "sliding_window is 0"),
    (QWEN2, {"max_window_layers": -1}, "max_window_layers is -1"),
    (QWEN2, {"use_logn_attn": True, "seq_length": 8}, "belong to architecture qwen"),
    (QWEN2, {"seq_length": 8}, "belong to architecture qwen"),
    (QWEN, {"seq_length": 1}, "seq_length is 1"),
    (QWEN, {"rope_dim": 2}, "rope_dim is 2, expected more than 2"),
]


@pytest.mark.parametrize(("base", "change", "message"), BAD)
def test_refuses(base: ModelConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        dataclasses.replace(base, **change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"factor": 0.5},
        {"factor": float("nan")},
        {"original_max_position_embeddings": 0},
        {"attention_factor": 0.0},
        {"beta_fast": 1.0},
        {"beta_slow": -1.0},
        {"beta_fast": float("inf")},
    ],
)
def test_refuses_yarn(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"yarn {next(iter(change))} is"):
        dataclasses.replace(YARN, **change)


def test_context_length_includes_yarn() -> None:
    assert QWEN2.context_length == 32768
    assert dataclasses.replace(QWEN2, yarn=YARN).context_length == 131072
    longer = dataclasses.replace(QWEN2, yarn=YARN, max_position_embeddings=200_000)
    assert longer.context_length == 200_000


def test_window_starts_at_max_window_layers() -> None:
    config = dataclasses.replace(QWEN2, sliding_window=512, max_window_layers=21)
    assert [config.window(i) for i in range(24)] == [None] * 21 + [512] * 3
    assert QWEN2.window(23) is None


def test_yarn_attention_factor() -> None:
    # Equation 22 of arXiv 2309.00071: sqrt(1/t) = 0.1 ln(s) + 1.
    assert yarn_attention_factor(4.0) == pytest.approx(1.1386294361119891, abs=1e-15)
    assert yarn_attention_factor(1.0) == 1.0


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QWEN2.num_layers = 1  # type: ignore[misc]
