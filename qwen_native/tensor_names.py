"""The tensors of a Qwen model: which there are, and what each file format calls them.

Canonical are the names that Hugging Face gives to Qwen2 and Qwen3. Qwen-1 and GGUF names are
mapped to them; a fused qkv projection becomes three views of its rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qwen_native.config import ModelConfig
from qwen_native.errors import CheckpointError, quoted
from qwen_native.gguf import BLOCKS
from qwen_native.tensor_source import TensorSource

FLOAT_TYPES = ("F32", "F16", "BF16")
"""Element types of norms and biases; weights may also have a block format."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_QKV = re.compile(r"self_attn\.([qkv])_proj")
_IGNORED = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|logn_tensor|attn\.bias|(self_)?attn\.masked_bias)"
)
"""Buffers in old checkpoints, which every implementation computes itself."""


@dataclass(frozen=True, slots=True)
class SourceNames:
    """What one file format calls the canonical tensors.

    Attributes:
        stems: canonical stem (without layer prefix and ".weight" or ".bias") to the format's stem.
        layers: what stands before the layer number.
        fused_qkv: stem of the fused projection, rows Q, K, V in this order; None when separate.
    """

    stems: Mapping[str, str]
    layers: str
    fused_qkv: str | None

    def source(self, canonical: str) -> tuple[str, str | None]:
        """(name in the file, None), or (name of the fused tensor, which of "q", "k", "v")."""
        stem, kind = canonical.rsplit(".", 1)
        match = _LAYER.fullmatch(stem)
        if match is None:
            return f"{self.stems.get(stem, stem)}.{kind}", None
        layer, stem = match.groups()
        part = _QKV.fullmatch(stem)
        if self.fused_qkv is not None and part is not None:
            return f"{self.layers}.{layer}.{self.fused_qkv}.{kind}", part[1]
        return f"{self.layers}.{layer}.{self.stems.get(stem, stem)}.{kind}", None


HF_QWEN2 = SourceNames(stems={}, layers="model.layers", fused_qkv=None)

HF_QWEN = SourceNames(
    # mlp computes c_proj(w1(x) * silu(w2(x))), so w2 is the gate.
    stems={
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1",
        "mlp.down_proj": "mlp.c_proj",
    },
    layers="transformer.h",
    fused_qkv="attn.c_attn",
)

_GGUF_STEMS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_QWEN2 = SourceNames(stems=_GGUF_STEMS, layers="blk", fused_qkv=None)
GGUF_QWEN = SourceNames(stems=_GGUF_STEMS, layers="blk", fused_qkv="attn_qkv")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and row-major shape of every tensor that a model of this config has."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inter, hidden),
        "mlp.up_proj.weight": (inter, hidden),
        "mlp.down_proj.weight": (hidden, inter),
    }
    if config.qkv_bias:
        layer["self_attn.q_proj.bias"] = (q_rows,)
        layer["self_attn.k_proj.bias"] = (kv_rows,)
        layer["self_attn.v_proj.bias"] = (kv_rows,)
    if config.qk_norm:
        layer["self_attn.q_norm.weight"] = (config.head_dim,)
        layer["self_attn.k_norm.weight"] = (config.head_dim,)

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def canonical_tensors(
    found: Mapping[str, TensorSource], config: ModelConfig, names: SourceNames
) -> dict[str, TensorSource]:
    """The tensors of a file under their canonical names, each checked against the config.

    Raises:
        CheckpointError: a tensor is missing, has another shape or an unsupported type, or is not
            part of the model.
    """
    tensors: dict[str, TensorSource] = {}
    used: set[str] = set()
    for canonical, shape in expected_shapes(config).items():
        name, part = names.source(canonical)
        label = quoted(name) if name == canonical else f"{quoted(name)} ({canonical})"
        source = found.get(name)
        if source is None:
            raise CheckpointError(f"tensor {label} is missing")
        used.add(name)
        begin, end, total = _fused_rows(config, part) if part else (0, shape[0], shape[0])
        _check(source, (total, *shape[1:]), label)
        tensors[canonical] = source.rows(begin, end, canonical)

    unknown = sorted(n for n in found.keys() - used if not _IGNORED.fullmatch(n))
    if unknown:
        more = f" (nor are {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"tensor {quoted(unknown[0])} is not part of a {config.architecture} model "
            f"with {config.num_layers} layers{more}"
        )
    return tensors


def _fused_rows(config: ModelConfig, part: str) -> tuple[int, int, int]:
    """(begin, end, total) of the rows of "q", "k" or "v" in a fused projection."""
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    begin, rows = {"q": (0, q_rows), "k": (q_rows, kv_rows), "v": (q_rows + kv_rows, kv_rows)}[part]
    return begin, begin + rows, q_rows + 2 * kv_rows


def _check(source: TensorSource, shape: tuple[int, ...], label: str) -> None:
    if source.shape != shape:
        raise CheckpointError(
            f"tensor {label} has shape {quoted(source.shape)}, expected {shape} from the config"
        )
    allowed = FLOAT_TYPES if len(shape) == 1 else tuple(BLOCKS)
    if source.dtype not in allowed:
        raise CheckpointError(
            f"tensor {label} has type {source.dtype}, expected one of {', '.join(allowed)}"
        )
