"""The Qwen model in torch, for training; all generations that the engine loads.

Parameters have the names of the checkpoints: Hugging Face's for Qwen2 and Qwen3, and the original
`transformer.h.N...` for Qwen. A batch is one token axis of concatenated documents, without padding.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from qwen_native import ops
from qwen_native.checkpoint import Checkpoint, open_checkpoint
from qwen_native.config import ModelConfig
from qwen_native.export import save_folder
from qwen_native.hub import resolve_model
from qwen_native.rope import rope_frequencies
from qwen_native.tensor_names import HF_QWEN, HF_QWEN2
from qwen_native.tensor_source import TensorSource

KERNELS = {"native": "qwen_native.autograd", "reference": "qwen_native.reference"}

_QWEN = {
    "model": "transformer", "embed": "wte", "layers": "h", "norm": "ln_f",
    "input_norm": "ln_1", "attention": "attn", "post_norm": "ln_2",
    "o": "c_proj", "gate": "w2", "up": "w1", "down": "c_proj",
}  # fmt: skip
_QWEN2 = {
    "model": "model", "embed": "embed_tokens", "layers": "layers", "norm": "norm",
    "input_norm": "input_layernorm", "attention": "self_attn",
    "post_norm": "post_attention_layernorm",
    "o": "o_proj", "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
}  # fmt: skip
_INIT_STD = 0.02


class _Named(nn.Module):
    """A module whose children have the names of their checkpoint generation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.names = _QWEN if config.architecture == "qwen" else _QWEN2

    def add(self, role: str, child: nn.Module) -> None:
        self.add_module(self.names[role], child)

    def child(self, role: str) -> Any:
        """The child in this role, whatever its class: an adapter may have replaced it."""
        return self.get_submodule(self.names[role])


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What every layer needs to know about the batch.

    Attributes:
        cu_seqlens: [documents + 1], int32.
        cos: [tokens, rope_dim / 2], float32.
        sin: like cos.
        query_scale: [tokens, 1, 1], float32: LogN; None where it is 1 for every token.
        dropout: of what each layer adds to the residual stream.
    """

    cu_seqlens: Tensor
    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None
    dropout: float

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        positions: Tensor,
        cu_seqlens: Tensor,
        extend: bool,
        dropout: float,
    ) -> Layout:
        """Compute the tables; `extend` applies Qwen's dynamic NTK and LogN to long documents."""
        places = positions.float()
        extend = extend and bool(config.use_dynamic_ntk or config.use_logn_attn)
        lengths = cu_seqlens.diff()
        extend = extend and bool((lengths > config.seq_length).any())
        if extend and config.use_dynamic_ntk:
            table = torch.stack([_frequencies(config, n) for n in lengths.tolist()])
            angles = places[:, None] * table.to(places.device).repeat_interleave(lengths, 0)
        else:
            angles = places[:, None] * _frequencies(config, 0).to(places.device)
        query_scale = None
        if extend and config.use_logn_attn:
            ratio = torch.log(places.double() + 1) / math.log(config.seq_length)
            query_scale = ratio.clamp(min=1.0).float()[:, None, None]
        factor = config.yarn.attention_factor if config.yarn is not None else 1.0
        return cls(cu_seqlens, angles.cos() * factor, angles.sin() * factor, query_scale, dropout)


@functools.lru_cache(maxsize=256)
def _frequencies(config: ModelConfig, length: int) -> Tensor:
    return torch.from_numpy(rope_frequencies(config, length))


class Linear(nn.Linear):
    """A linear layer on the model's kernels."""

    def __init__(self, cols: int, rows: int, bias: bool, kernels: ModuleType) -> None:
        super().__init__(cols, rows, bias)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.kernels.linear(x, self.weight, self.bias)
        return out


class RmsNorm(nn.Module):
    """The weight of an RMSNorm; the ops compute it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Attention(_Named):
    """Grouped-query attention with rope and, by generation, biases and QK-norm."""

    def __init__(self, config: ModelConfig, layer: int, kernels: ModuleType) -> None:
        super().__init__(config)
        self.kernels = kernels
        self.window = config.window(layer) or 0
        hidden = config.hidden_size
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.sizes = [q_rows, kv_rows, kv_rows]
        if config.architecture == "qwen":
            self.c_attn = Linear(hidden, sum(self.sizes), config.qkv_bias, kernels)
        else:
            self.q_proj = Linear(hidden, q_rows, config.qkv_bias, kernels)
            self.k_proj = Linear(hidden, kv_rows, config.qkv_bias, kernels)
            self.v_proj = Linear(hidden, kv_rows, config.qkv_bias, kernels)
        if config.qk_norm:
            self.q_norm, self.k_norm = RmsNorm(config.head_dim), RmsNorm(config.head_dim)
        self.add("o", Linear(q_rows, hidden, False, kernels))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        config, kernels = self.config, self.kernels
        if config.architecture == "qwen":
            rows = self.c_attn(x).split(self.sizes, dim=-1)
        else:
            rows = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (r.unflatten(-1, (-1, config.head_dim)) for r in rows)
        if config.qk_norm:
            q = kernels.rms_norm(q, self.q_norm.weight, config.rms_norm_eps)
            k = kernels.rms_norm(k, self.k_norm.weight, config.rms_norm_eps)
        q = kernels.rope(q, layout.cos, layout.sin)
        k = kernels.rope(k, layout.cos, layout.sin)
        if layout.query_scale is not None:
            q = q * layout.query_scale.to(q.dtype)
        scale = 1.0 / math.sqrt(config.head_dim)
        mixed = kernels.attention(q, k, v, layout.cu_seqlens, scale, self.window)
        out: Tensor = self.child("o")(mixed.flatten(1))
        return out


class Mlp(_Named):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, kernels: ModuleType) -> None:
        super().__init__(config)
        self.kernels = kernels
        hidden, inter = config.hidden_size, config.intermediate_size
        self.add("up", Linear(hidden, inter, False, kernels))
        self.add("gate", Linear(hidden, inter, False, kernels))
        self.add("down", Linear(inter, hidden, False, kernels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.child("down")(
            self.kernels.swiglu(self.child("gate")(x), self.child("up")(x))
        )
        return out


class Block(_Named):
    """One layer: x + attention(norm(x)), then the same with the MLP."""

    def __init__(self, config: ModelConfig, layer: int, kernels: ModuleType) -> None:
        super().__init__(config)
        self.kernels = kernels
        self.add("input_norm", RmsNorm(config.hidden_size))
        self.add("attention", Attention(config, layer, kernels))
        self.add("post_norm", RmsNorm(config.hidden_size))
        self.mlp = Mlp(config, kernels)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        eps = self.config.rms_norm_eps
        normed = self.kernels.rms_norm(x, self.child("input_norm").weight, eps)
        mixed = F.dropout(self.child("attention")(normed, layout), layout.dropout)
        normed, total = self.kernels.add_rms_norm(mixed, x, self.child("post_norm").weight, eps)
        out: Tensor = total + F.dropout(self.mlp(normed), layout.dropout)
        return out


class Qwen(_Named):
    """A Qwen model without its vocabulary's softmax, which losses compute from `head_weight`.

    Attributes:
        config: the shape.
        kernels: the module with the ops, `qwen_native.autograd` or `qwen_native.reference`.
        activation_checkpointing: keep only each layer's input for the backward pass and compute
            the rest of the layer again: less memory for a third more time.
        dropout: in training mode, of the embeddings and of what each layer adds to the residual
            stream; default 0.
        source: the checkpoint that the parameters came from, or None; `save` copies its tokenizer.
    """

    def __init__(self, config: ModelConfig, kernels: str = "reference") -> None:
        """Make a model with random parameters: N(0, 0.02), projections into the residual stream
        N(0, 0.02 / sqrt(2 num_layers)), biases 0, norms 1.

        Args:
            config: the shape.
            kernels: "native" for the package's own kernels, "reference" for plain torch.

        Raises:
            ValueError: `kernels` is something else.
        """
        super().__init__(config)
        if kernels not in KERNELS:
            raise ValueError(f"kernels is {kernels!r}, expected one of {', '.join(KERNELS)}")
        self.kernels = importlib.import_module(KERNELS[kernels])
        self.activation_checkpointing = False
        self.dropout = 0.0
        self.source: Checkpoint | None = None
        trunk = _Named(config)
        trunk.add("embed", nn.Embedding(config.vocab_size, config.hidden_size))
        blocks = [Block(config, i, self.kernels) for i in range(config.num_layers)]
        trunk.add("layers", nn.ModuleList(blocks))
        trunk.add("norm", RmsNorm(config.hidden_size))
        self.add("model", trunk)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.head_weight.is_meta:
            self._initialise()

    @property
    def embedding(self) -> Any:
        """The input embedding, an nn.Embedding of [vocab, hidden] unless an adapter replaced it."""
        return self.child("model").child("embed")

    @property
    def layers(self) -> Any:
        """The blocks, in order: an nn.ModuleList."""
        return self.child("model").child("layers")

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, [vocab, hidden]; the embedding's own where they are tied."""
        head = self.embedding if self.config.tie_word_embeddings else self.lm_head
        weight: Tensor = head.weight
        return weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Run the model over a flat batch.

        In evaluation mode the original Qwen's dynamic NTK and LogN apply to documents longer than
        its `seq_length`, as in the engine; in training mode they do not, as in the original.

        Args:
            tokens: [tokens], int64.
            positions: [tokens], the position of each token in its document.
            cu_seqlens: [documents + 1], int32; a token attends only to tokens of its document.
            targets: [tokens], int64; -100 where a token does not count.

        Returns:
            The hidden states after the final norm, [tokens, hidden]; with `targets` their summed
            cross-entropy, a float32 scalar.
        """
        dropout = self.dropout if self.training else 0.0
        layout = Layout.of(self.config, positions, cu_seqlens, not self.training, dropout)
        x = F.dropout(self._embed(tokens, with_loss=targets is not None), dropout)
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = recompute(layer, x, layout, use_reentrant=False)
            else:
                x = layer(x, layout)
        norm = self.child("model").child("norm").weight
        hidden: Tensor = self.kernels.rms_norm(x, norm, self.config.rms_norm_eps)
        if targets is None:
            return hidden
        loss: Tensor = self.kernels.linear_cross_entropy(hidden, self.head_weight, targets)
        return loss

    def _embed(self, tokens: Tensor, with_loss: bool) -> Tensor:
        """The tokens' embeddings, [tokens, hidden]."""
        # The loss's gradient of a tied matrix is dense, and autograd adds a sparse one to it in
        # place: no second matrix of the vocabulary's size.
        tied = with_loss and self.config.tie_word_embeddings
        if tied and type(self.embedding) is nn.Embedding and not torch.compiler.is_compiling():
            return F.embedding(tokens, self.embedding.weight, sparse=True)
        embeddings: Tensor = self.embedding(tokens)
        return embeddings

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        kernels: str = "reference",
        convert: Callable[[nn.Linear], nn.Module] | None = None,
    ) -> Qwen:
        """Load a checkpoint: a folder, a .gguf file, a Hugging Face id, or None for the demo model.

        Quantised tensors are decoded. The model is in training mode.

        Args:
            path: of the checkpoint.
            dtype: of the parameters.
            kernels: as of `Qwen`.
            convert: what takes the place of a linear layer within the transformer's layers, made as
                soon as that layer is loaded: so the layers are never all in memory as they were.

        Raises:
            CheckpointError: the checkpoint is not usable.
        """
        checkpoint = open_checkpoint(resolve_model(path))
        with torch.device("meta"):
            model = cls(checkpoint.config, kernels)
        model.to(dtype)
        model.source = checkpoint
        missing = {name: parameter.shape[0] for name, parameter in model.named_parameters()}
        names = HF_QWEN if checkpoint.config.architecture == "qwen" else HF_QWEN2
        with torch.no_grad():
            # A fused projection comes as three sources in the order of its rows.
            for canonical, source in checkpoint.tensors.items():
                name, _ = names.source(canonical)
                owner, _, kind = name.rpartition(".")
                module = model.get_submodule(owner)
                if getattr(module, kind).is_meta:
                    module.to_empty(device="cpu")
                parameter, rows = getattr(module, kind), source.shape[0]
                begin = parameter.shape[0] - missing[name]
                parameter[begin : begin + rows] = torch.from_numpy(_decode(source))
                missing[name] -= rows
                checkpoint.release(source)
                parts = [f"{owner}.{part}" for part, _ in module.named_parameters()]
                if convert and isinstance(module, Linear) and not any(missing[n] for n in parts):
                    model.set_submodule(owner, convert(module))
                del module, parameter  # whose memory the next ones use
        return model

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder that transformers and the engine load.

        It holds the config, the parameters in their present types, and the tokenizer's files as far
        as `source` has them. It appears whole or not at all.

        Raises:
            ValueError: the folder exists and is not empty.
        """
        save_folder(Path(folder), self.config, self.state_dict(), self.source)

    @torch.no_grad()
    def _initialise(self) -> None:
        into_residual = _INIT_STD / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight")):
                parameter.normal_(0.0, into_residual)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, _INIT_STD)
            elif name.endswith(".bias"):
                parameter.zero_()


def _decode(source: TensorSource) -> npt.NDArray[np.float32]:
    rows, cols = source.shape if len(source.shape) == 2 else (1, source.shape[0])
    return ops.decode_source(source.data, source.dtype, (rows, cols)).reshape(source.shape)
