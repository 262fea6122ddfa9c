"""Builds a `ModelConfig` from Hugging Face's config.json; what the engine lacks is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_native.config import ARCHITECTURES, ModelConfig, YarnScaling, yarn_attention_factor
from qwen_native.config_fields import Fields, branch_width, head_width, unknown_architecture
from qwen_native.errors import CheckpointError, quoted

_QWEN_ALLOWED: dict[str, tuple[bool | float | str, ...]] = {
    "no_bias": (True,),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (False,),
    "activation": ("swiglu",),
    "pos_emb": ("rotary",),
    "apply_residual_connection_post_layernorm": (False,),
    "rope_scaling": (),
}
_QWEN2_ALLOWED: dict[str, tuple[bool | float | str, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "use_mrope": (False,),
    "num_experts": (0,),
    "dual_chunk_attention_config": (),
}
_ROPE_KEYS = {
    "rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "original_max_position_embeddings",
}  # fmt: skip


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Build from a parsed config.json of model_type qwen (old and new keys), qwen2 or qwen3.

    Absent optional keys take transformers' defaults for the model type.

    Raises:
        CheckpointError: unknown model_type, missing or bad field, unsupported feature.
    """
    fields = Fields(config)
    model_type = fields.text("model_type")
    if model_type == "qwen":
        return _qwen(fields)
    if model_type in ("qwen2", "qwen3"):
        return _qwen2(fields, model_type)
    raise unknown_architecture("model_type", model_type, ARCHITECTURES)


def _qwen(fields: Fields) -> ModelConfig:
    fields.require(_QWEN_ALLOWED)
    hidden_size = fields.integer("hidden_size", "n_embd")
    num_layers = fields.integer("num_hidden_layers", "n_layer")
    num_heads = fields.integer("num_attention_heads", "n_head")
    head_dim = head_width(hidden_size, num_heads)
    fields.require({"kv_channels": (head_dim,)})
    rotary_pct = fields.number("rotary_pct", default=1.0)
    if not 0.0 < rotary_pct <= 1.0:
        raise CheckpointError(f"rotary_pct is {rotary_pct}, expected more than 0 and at most 1")
    return ModelConfig(
        architecture="qwen",
        hidden_size=hidden_size,
        intermediate_size=branch_width(fields, "intermediate_size", "ffn_hidden_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        vocab_size=fields.integer("padded_vocab_size", "vocab_size"),
        rms_norm_eps=fields.number("layer_norm_epsilon"),
        rope_theta=fields.number("rotary_emb_base", default=10000.0),
        rope_dim=int(head_dim * rotary_pct),
        max_position_embeddings=fields.integer("max_position_embeddings", "n_positions"),
        tie_word_embeddings=False,
        qkv_bias=True,
        qk_norm=False,
        sliding_window=None,
        max_window_layers=num_layers,
        yarn=None,
        use_dynamic_ntk=fields.flag("use_dynamic_ntk"),
        use_logn_attn=fields.flag("use_logn_attn"),
        seq_length=fields.integer("seq_length"),
    )


def _qwen2(fields: Fields, model_type: str) -> ModelConfig:
    qwen3 = model_type == "qwen3"
    fields.require(_QWEN2_ALLOWED)
    # Qwen2 always has a bias on q, k and v. In Qwen3 the switch would also add one to o_proj.
    fields.require({"attention_bias": (not qwen3,)})
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers")
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.optional_integer("head_dim")
    if head_dim is None:
        head_dim = 128 if qwen3 else head_width(hidden_size, num_heads)
    max_position_embeddings = fields.integer("max_position_embeddings", default=32768)
    rope_theta, yarn = _rope(fields, max_position_embeddings)
    sliding_window, max_window_layers = _window(fields, num_layers)
    return ModelConfig(
        architecture=model_type,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size"),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=rope_theta,
        rope_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        qkv_bias=not qwen3,
        qk_norm=qwen3,
        sliding_window=sliding_window,
        max_window_layers=max_window_layers,
        yarn=yarn,
        use_dynamic_ntk=False,
        use_logn_attn=False,
        seq_length=0,
    )


def _window(fields: Fields, num_layers: int) -> tuple[int | None, int]:
    """(sliding_window, max_window_layers) by transformers' rule; (None, num_layers) without."""
    sliding_window = None
    if fields.flag("use_sliding_window", default=False):
        # transformers: an absent key means 4096, an explicit null no window.
        sliding_window = fields.optional_integer("sliding_window")
        if "sliding_window" not in fields:
            sliding_window = 4096
    layer_types = fields.get("layer_types")
    if layer_types is None:
        first = fields.integer("max_window_layers", default=28)
    else:
        first = _first_windowed_layer(layer_types, num_layers)
        if first < num_layers and sliding_window is None:
            raise CheckpointError(
                "layer_types names sliding_attention layers, "
                "expected use_sliding_window and sliding_window with them"
            )
    if sliding_window is None or first >= num_layers:
        return None, num_layers
    return sliding_window, first


def _first_windowed_layer(layer_types: Any, num_layers: int) -> int:
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise CheckpointError(
            f"layer_types is {quoted(layer_types)}, expected a list of {num_layers} types"
        )
    first = layer_types.count("full_attention")
    if layer_types != ["full_attention"] * first + ["sliding_attention"] * (num_layers - first):
        raise CheckpointError(
            f"layer_types is {quoted(layer_types)}, "
            "expected full_attention layers followed by sliding_attention layers"
        )
    return first


def _rope(fields: Fields, max_position_embeddings: int) -> tuple[float, YarnScaling | None]:
    """(rope_theta, yarn) from rope_scaling or its newer name rope_parameters.

    Follows transformers 5: keys inside the dictionary win over keys beside it; `factor` is used as
    given, and only a null one is the ratio of the two context lengths.
    """
    parameters = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(f"rope_scaling is {quoted(parameters)}, expected an object")
    unknown = sorted(parameters.keys() - _ROPE_KEYS)
    if unknown:
        raise CheckpointError(f"rope_scaling has the key {quoted(unknown[0])}, which is unknown")
    rope = Fields(parameters)
    rope.require({"partial_rotary_factor": (1.0,), "truncate": (True,)})
    rope_theta = rope.optional_number("rope_theta")
    if rope_theta is None:
        rope_theta = fields.number("rope_theta", default=10000.0)
    kind = rope.text("rope_type", "type", default="default")
    if kind == "default":
        return rope_theta, None
    if kind != "yarn":
        raise CheckpointError(
            f"rope_scaling type is {quoted(kind)}, which is not supported; expected default or yarn"
        )
    return rope_theta, _yarn(fields, rope, max_position_embeddings)


def _yarn(fields: Fields, rope: Fields, max_position_embeddings: int) -> YarnScaling:
    original = fields.optional_integer("original_max_position_embeddings")
    if original is None:
        original = rope.integer("original_max_position_embeddings", default=max_position_embeddings)
    if original < 1:
        raise CheckpointError("original_max_position_embeddings is 0, expected at least 1")
    null_factor = max_position_embeddings / original if "factor" in rope else None
    factor = rope.number("factor", default=null_factor)
    attention_factor = rope.optional_number("attention_factor")
    if attention_factor is None:
        mscale = rope.number("mscale", default=0.0)
        mscale_all_dim = rope.number("mscale_all_dim", default=0.0)
        if min(mscale, mscale_all_dim) < 0.0:
            raise CheckpointError("rope_scaling mscale is negative, expected at least 0")
        attention_factor = (
            yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all_dim)
            if mscale and mscale_all_dim
            else yarn_attention_factor(factor)
        )
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
        beta_fast=rope.number("beta_fast", default=0.0) or 32.0,
        beta_slow=rope.number("beta_slow", default=0.0) or 1.0,
    )
