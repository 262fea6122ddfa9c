"""The shape and the switches of a Qwen model: one description for all generations.

`config_hf` builds it from Hugging Face's config.json, `config_gguf` from GGUF metadata.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_native.errors import CheckpointError, quoted

ARCHITECTURES = ("qwen", "qwen2", "qwen3")

_INT_LIMITS = {
    "hidden_size": (1, 1 << 20), "intermediate_size": (1, 1 << 22), "num_layers": (1, 1 << 10),
    "num_heads": (1, 1 << 12), "num_kv_heads": (1, 1 << 12), "head_dim": (2, 1 << 10),
    "vocab_size": (1, 1 << 24), "rope_dim": (2, 1 << 10), "max_position_embeddings": (1, 1 << 30),
    "max_window_layers": (0, 1 << 10), "seq_length": (0, 1 << 30),
}  # fmt: skip
_FLAGS = ("tie_word_embeddings", "qkv_bias", "qk_norm", "use_dynamic_ntk", "use_logn_attn")


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN rope scaling, every default resolved (arXiv 2309.00071, as transformers computes it).

    Attributes:
        factor: s, the extension of the context; frequencies are interpolated to f / s.
        original_max_position_embeddings: context of the training, in tokens.
        attention_factor: multiplies cos and sin; 0.1 ln(s) + 1 unless the checkpoint says else.
        beta_fast: rotations in the original context above which a frequency is kept.
        beta_slow: rotations below which a frequency is fully interpolated.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float
    beta_slow: float

    def __post_init__(self) -> None:
        _check_float("yarn factor", self.factor, 1.0, 1e6)
        _check_int(
            "yarn original_max_position_embeddings",
            self.original_max_position_embeddings,
            *_INT_LIMITS["max_position_embeddings"],
        )
        _check_float("yarn attention_factor", self.attention_factor, 1e-6, 1e6)
        _check_float("yarn beta_fast", self.beta_fast, 1e-6, 1e9)
        _check_float("yarn beta_slow", self.beta_slow, 1e-6, 1e9)
        if self.beta_fast <= self.beta_slow:
            raise CheckpointError(
                f"yarn beta_fast is {self.beta_fast}, expected more than beta_slow {self.beta_slow}"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that the forward pass needs to know about a model; checked on construction.

    Attributes:
        architecture: "qwen", "qwen2" (also Qwen1.5 and Qwen2.5) or "qwen3".
        hidden_size: width of the residual stream.
        intermediate_size: width of one SwiGLU branch (half of what Qwen-1's config.json says).
        num_layers, num_heads, num_kv_heads: num_kv_heads divides num_heads.
        head_dim: even; num_heads * head_dim need not be hidden_size (Qwen3).
        vocab_size: rows of the embedding matrix, often more than the tokenizer has.
        rms_norm_eps: in every RMSNorm.
        rope_theta: base of the rope frequencies.
        rope_dim: leading dimensions of each head that rope turns; even, at most head_dim.
        max_position_embeddings: context in tokens as the checkpoint states it.
        tie_word_embeddings: the output matrix is the embedding matrix.
        qkv_bias: biases on the q, k and v projections.
        qk_norm: RMSNorm over each head of q and k before rope.
        sliding_window: tokens that a query of a windowed layer sees, itself included; None when no
            layer has a window.
        max_window_layers: layers with this index or above have the window; num_layers when none.
        yarn: rope scaling or None.
        use_dynamic_ntk: Qwen-1's dynamic NTK; implies seq_length.
        use_logn_attn: Qwen-1's LogN scaling of the queries; implies seq_length.
        seq_length: Qwen-1's training context, in tokens; 0 in the other architectures.

    Raises:
        CheckpointError: a field has the wrong type or is out of range, or two do not fit together.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None
    max_window_layers: int
    yarn: YarnScaling | None
    use_dynamic_ntk: bool
    use_logn_attn: bool
    seq_length: int

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"architecture is {quoted(self.architecture)}, expected one of {ARCHITECTURES}"
            )
        for name, (low, high) in _INT_LIMITS.items():
            _check_int(name, getattr(self, name), low, high)
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                raise CheckpointError(
                    f"{name} is {quoted(getattr(self, name))}, expected True or False"
                )
        _check_float("rms_norm_eps", self.rms_norm_eps, 1e-30, 1.0)
        _check_float("rope_theta", self.rope_theta, 1.0 + 1e-6, 1e15)
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_kv_heads is {self.num_kv_heads}, "
                f"expected a divisor of num_heads {self.num_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}, expected an even number")
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise CheckpointError(
                f"rope_dim is {self.rope_dim}, expected an even number up to head_dim "
                f"{self.head_dim}"
            )
        if self.sliding_window is not None:
            _check_int("sliding_window", self.sliding_window, 1, 1 << 30)
        self._check_qwen1()

    def _check_qwen1(self) -> None:
        scaled = self.use_dynamic_ntk or self.use_logn_attn
        if scaled and self.seq_length < 2:
            raise CheckpointError(
                f"seq_length is {self.seq_length}, expected at least 2 "
                "with use_dynamic_ntk or use_logn_attn"
            )
        if self.use_dynamic_ntk and self.rope_dim <= 2:
            raise CheckpointError(
                f"rope_dim is {self.rope_dim}, expected more than 2 with use_dynamic_ntk"
            )
        if self.architecture != "qwen" and (scaled or self.seq_length):
            raise CheckpointError(
                "use_dynamic_ntk, use_logn_attn and seq_length belong to architecture qwen, "
                f"not {self.architecture}"
            )

    @property
    def context_length(self) -> int:
        """Longest context in tokens that the checkpoint is meant for, YaRN included."""
        if self.yarn is None:
            return self.max_position_embeddings
        extended = int(self.yarn.factor * self.yarn.original_max_position_embeddings)
        return max(self.max_position_embeddings, extended)

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, None for full attention."""
        return self.sliding_window if layer >= self.max_window_layers else None


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise CheckpointError(
            f"{name} is {quoted(value)}, expected a whole number from {low} to {high}"
        )


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if type(value) is not float or not low <= value <= high:
        raise CheckpointError(f"{name} is {quoted(value)}, expected a number from {low} to {high}")


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """YaRN's default scale of cos and sin, 0.1 mscale ln(factor) + 1 (arXiv 2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
