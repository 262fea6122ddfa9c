"""A Qwen trunk with a head that gives one number per token: reward models and critics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen_native.errors import CheckpointError
from qwen_native.files import read_json_object
from qwen_native.nn import Qwen
from qwen_native.train.data import Batch, Sample
from qwen_native.train.lora import (
    active_adapter,
    adapter_parameters,
    load_adapter,
    read_tensors,
    save_adapter,
)
from qwen_native.train.objectives import pairwise_logistic_loss

_HEAD_FILE = "score.safetensors"
_HEAD = "score.weight"
_BASE_FILE = "adapter_config.json"


class ScalarModel(nn.Module):
    """score . h_t for every token t, h being the hidden states after the final norm.

    A reward model's reward is the number at the response's end token (the report's §3.2.1), a
    critic's value of a token is the number at the token before it.

    Attributes:
        trunk: the model. With an `adapter`, others use it, too, with theirs.
        adapter: name of this one's adapter in the trunk; None when the whole trunk is its own.
        score: the head, [hidden], float32.
    """

    def __init__(self, trunk: Qwen, adapter: str | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.adapter = adapter
        if adapter is None and not trunk.config.tie_word_embeddings:
            trunk.lm_head.requires_grad_(False)  # it takes no part
        hidden = trunk.config.hidden_size
        # As in Stiennon et al. 2020 (arXiv 2009.01325).
        self.score = nn.Parameter(torch.randn(hidden) / math.sqrt(hidden + 1))

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The number of every token, [tokens] float32; arguments as those of `Qwen`."""
        if self.adapter is None:
            hidden = self.trunk(tokens, positions, cu_seqlens)
        else:
            with active_adapter(self.trunk, self.adapter):
                hidden = self.trunk(tokens, positions, cu_seqlens)
        out: Tensor = hidden.float() @ self.score
        return out

    def own_parameters(self) -> Mapping[str, nn.Parameter]:
        """What training this model changes, by name."""
        if self.adapter is None:
            return dict(self.named_parameters())
        adapters = adapter_parameters(self.trunk, self.adapter)
        return {"score": self.score, **{f"adapter.{i}": p for i, p in enumerate(adapters)}}

    def rewards(self, samples: Sequence[Sample]) -> Tensor:
        """The number at the last token of each document, [documents] float32."""
        batch = Batch.of(samples).to(self.score.device)
        numbers: Tensor = self(batch.tokens, batch.positions, batch.cu_seqlens)
        return numbers[batch.cu_seqlens[1:].long() - 1]

    def pair_losses(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Pairwise logistic loss and margin of each pair, [pairs]."""
        chosen, rejected = self.rewards(samples).reshape(-1, 2).unbind(1)
        return pairwise_logistic_loss(chosen, rejected), chosen - rejected

    def save(self, folder: Path, base: str = "") -> None:
        """Write the trunk as a Hugging Face folder (its adapter alone if it has one) and the head.

        Args:
            folder: a new one.
            base: name or path of an adapter's base model.

        Raises:
            ValueError: the folder exists and is not empty.
        """
        if self.adapter is None:
            self.trunk.save(folder)
        else:
            save_adapter(self.trunk, folder, self.adapter, base)
        save_file({_HEAD: self.score.detach().cpu()[None].clone()}, folder / _HEAD_FILE)

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        kernels: str = "reference",
        shared: Qwen | None = None,
        adapter: str = "score",
    ) -> ScalarModel:
        """Load what `save` wrote.

        Args:
            folder: with the head, and a model or an adapter.
            dtype: of the trunk.
            kernels: as of `Qwen`.
            shared: the model that an adapter is put into; None loads its base.
            adapter: the name it gets there.

        Raises:
            CheckpointError: a file is missing or damaged, or does not fit the others.
        """
        if (folder / _BASE_FILE).exists():
            trunk = shared or Qwen.load(_base_of(folder), dtype, kernels)
            load_adapter(trunk, folder, adapter)
            model = cls(trunk, adapter)
        else:
            model = cls(Qwen.load(folder, dtype, kernels))
        if not load_head(model, folder):
            raise CheckpointError(
                f"{folder}: has no {_HEAD_FILE}, expected a reward model or critic"
            )
        return model


def load_head(model: ScalarModel, folder: Path) -> bool:
    """Take over the head in a folder; False when there is none.

    Raises:
        CheckpointError: it is damaged or belongs to another model.
    """
    path = folder / _HEAD_FILE
    if not path.exists():
        return False
    head = read_tensors(path).get(_HEAD)
    expected = (1, model.score.numel())
    if head is None or tuple(head.shape) != expected:
        shape = "missing" if head is None else tuple(head.shape)
        raise CheckpointError(f"{path}: {_HEAD} is {shape}, expected {expected}")
    with torch.no_grad():
        model.score.copy_(head[0])
    return True


def _base_of(folder: Path) -> str | None:
    """The base model that an adapter's config names; None for the demo model."""
    base = read_json_object(folder / _BASE_FILE, 1 << 20).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder / _BASE_FILE}: names no base model")
    return None if base == "demo" else base
