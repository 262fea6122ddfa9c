"""Builds a `ModelConfig` from GGUF metadata; what the engine lacks is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_native.config import ARCHITECTURES, ModelConfig, YarnScaling, yarn_attention_factor
from qwen_native.config_fields import Fields, branch_width, head_width, unknown_architecture
from qwen_native.errors import CheckpointError, quoted

_ALLOWED: dict[str, tuple[bool | float | str, ...]] = {
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def config_from_gguf(
    metadata: Mapping[str, Any], *, vocab_size: int, tie_word_embeddings: bool
) -> ModelConfig:
    """Build from GGUF metadata of general.architecture qwen, qwen2 or qwen3.

    Two facts are only in the tensors: `vocab_size`, the rows of `token_embd.weight`, and
    `tie_word_embeddings`, that there is no `output.weight`.

    GGUF has no keys for Qwen-1's dynamic NTK and LogN. The released sizes are recognised by width
    and depth and get the values of their config.json; any other size gets plain rope, as in
    llama.cpp.

    Raises:
        CheckpointError: unknown architecture, missing or bad key, unsupported feature.
    """
    architecture = Fields(metadata).text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise unknown_architecture("general.architecture", architecture, ARCHITECTURES)
    fields = Fields(metadata, prefix=f"{architecture}.")
    return _build(fields, architecture, vocab_size, tie_word_embeddings)


def _build(
    fields: Fields, architecture: str, vocab_size: int, tie_word_embeddings: bool
) -> ModelConfig:
    fields.require(_ALLOWED)
    qwen1 = architecture == "qwen"
    hidden_size = fields.integer("embedding_length")
    num_layers = fields.integer("block_count")
    num_heads = fields.integer("attention.head_count")
    head_dim = fields.optional_integer("attention.key_length")
    if head_dim is None:
        head_dim = head_width(hidden_size, num_heads)
    fields.require({"attention.value_length": (head_dim,)})
    context_length = fields.integer("context_length")
    scaled, seq_length = False, 0
    if qwen1:
        scaled, seq_length = _released_qwen(hidden_size, num_layers, context_length)
        intermediate_size = branch_width(fields, "feed_forward_length")
    else:
        intermediate_size = fields.integer("feed_forward_length")
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number("rope.freq_base", default=10000.0),
        rope_dim=fields.integer("rope.dimension_count", default=head_dim),
        max_position_embeddings=context_length,
        tie_word_embeddings=tie_word_embeddings,
        qkv_bias=architecture != "qwen3",
        qk_norm=architecture == "qwen3",
        sliding_window=None,
        max_window_layers=num_layers,
        yarn=_yarn(fields, context_length),
        use_dynamic_ntk=scaled,
        use_logn_attn=scaled,
        seq_length=seq_length,
    )


def _released_qwen(hidden_size: int, num_layers: int, context_length: int) -> tuple[bool, int]:
    """(dynamic NTK and LogN on, seq_length) of the released Qwen-1 of this width and depth.

    1.8B and 7B were trained at 8192, 14B and the first 7B (whose context_length is 6144) at 2048,
    72B at 32768 with a larger rope base and neither method.
    """
    if (hidden_size, num_layers, context_length) == (4096, 32, 6144):
        return True, 2048
    released = {(2048, 24): 8192, (4096, 32): 8192, (5120, 40): 2048}
    seq_length = released.get((hidden_size, num_layers))
    return (False, context_length) if seq_length is None else (True, seq_length)


def _yarn(fields: Fields, context_length: int) -> YarnScaling | None:
    factor = fields.number("rope.scaling.factor", "rope.scale_linear", default=1.0)
    # llama.cpp reads a factor without a type as linear scaling.
    kind = fields.text("rope.scaling.type", default="none" if factor in (0.0, 1.0) else "linear")
    if kind == "none":
        return None
    if kind != "yarn":
        raise CheckpointError(
            f"rope.scaling.type is {quoted(kind)}, which is not supported; expected none or yarn"
        )
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=fields.integer(
            "rope.scaling.original_context_length", default=context_length
        ),
        attention_factor=yarn_attention_factor(factor),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", default=32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", default=1.0),
    )
