"""LoRA and QLoRA: small trainable matrices beside frozen ones, in PEFT's file format.

A linear layer y = x W^T + b becomes y = x W^T + b + s (x A^T) B^T with A [rank, in], B [out, rank]
and s = alpha / rank (Hu et al. 2021, arXiv 2106.09685). B begins at zero, so training begins at the
base model. With QLoRA (Dettmers et al. 2023, arXiv 2305.14314) W is held in the engine's int4 or
int8 format: its native GEMM multiplies with it directly, and the backward pass unpacks one matrix
at a time.

Several adapters may stand on one base, one of them (or none) being active: PPO's memory-lean mode
has the policy and the critic as adapters, and the bare base as the reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen_native import ops
from qwen_native.autograd import product
from qwen_native.errors import CheckpointError
from qwen_native.files import read_json_object
from qwen_native.nn import Qwen
from qwen_native.safetensors import read_safetensors
from qwen_native.tensor_names import FLOAT_TYPES
from qwen_native.train.session import section

QUANTIZED_FORMATS = ("int4", "int8")
POLICY = "default"  # the adapter that is trained unless said otherwise; PEFT's name for it

_WEIGHTS_FILE = "adapter_model.safetensors"
_CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 1 << 20
_TARGETS = {
    "qwen": ("c_attn", "c_proj", "w1", "w2"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
_TARGETS["qwen3"] = _TARGETS["qwen2"]


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted and how. The defaults are those of Qwen's finetune.py.

    Attributes:
        rank: columns of the small matrices.
        alpha: the product of the small matrices is scaled by alpha / rank.
        dropout: share of the inputs of the small matrices that is zeroed in training.
        targets: last parts of the names of the linear layers that are adapted; empty = all of them
            within the transformer's layers.
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha is {self.alpha}, expected more than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected at least 0 and less than 1")


@section
@dataclass(frozen=True)
class LoraOptions(LoraConfig):
    """LoRA in a recipe.

    Attributes:
        quantize: format of the frozen base: "int4" or "int8" for QLoRA, null for none.
        embeddings: "train" the embedding and the head in full beside the adapters, "freeze" them,
            or "auto": train them when the checkpoint does not know the tokens of ChatML.
    """

    quantize: Literal["int4", "int8"] | None = None
    embeddings: Literal["auto", "train", "freeze"] = "auto"


class _AddLowRank(torch.autograd.Function):
    """y += scale (x A^T) B^T in place: y is a product that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        inner = product(x, a, b_transposed=True).mul_(scale)
        ctx.save_for_backward(x, inner, a, b)
        ctx.scale = scale
        ctx.mark_dirty(y)
        return product(inner, b, b_transposed=True, out=y, add=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        d_inner = product(dy, b).mul_(ctx.scale)
        wanted = ctx.needs_input_grad
        da = product(d_inner, x, a_transposed=True).float() if wanted[2] else None
        db = product(dy, inner, a_transposed=True).float() if wanted[3] else None
        dx = product(d_inner, a) if wanted[1] else None
        return dy, dx, da, db, None


class LowRank(nn.Module):
    """One adapter of one linear layer; `lora_A` [rank, in] and `lora_B` [out, rank], float32."""

    def __init__(self, in_features: int, out_features: int, config: LoraConfig) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in PEFT

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the adapter's part to y, the base's product with x; y is overwritten."""
        x = F.dropout(x, self.dropout, self.training)
        out: Tensor = _AddLowRank.apply(  # type: ignore[no-untyped-call]
            y, x, self.lora_A, self.lora_B, self.scale
        )
        return out

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, [out, in], float32."""
        return (self.lora_B @ self.lora_A) * self.scale


class _Scratch:
    """Memory that every product uses again: made and freed each time, such large pieces of changing
    sizes would leave more and more holes between what stays."""

    def __init__(self) -> None:
        self.pieces: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if name not in self.pieces or self.pieces[name].numel() < size:
            self.pieces[name] = torch.empty(size, dtype=torch.uint8)
        return self.pieces[name][:size].view(dtype).view(shape)


_scratch = _Scratch()


class _QuantizedProduct(torch.autograd.Function):
    """x W^T by the native GEMM; the gradient uses the matrix that W stands for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: ops.PackedWeight) -> Tensor:
        ctx.weight = weight
        rows = (len(x), weight.shape[0])
        wide = _scratch.take("x", tuple(x.shape), torch.float32).copy_(x)
        out: Tensor = ops.linear(wide, weight, out=_scratch.take("out", rows, torch.float32))
        return out.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        decoded = torch.from_numpy(ops.unpack_weight(ctx.weight))
        narrow = _scratch.take("weight", tuple(decoded.shape), dy.dtype).copy_(decoded)
        return product(dy, narrow), None


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is held in one of the engine's quantised formats.

    Its forward pass multiplies x, rounded to int8, with the packed weight. Gradients with respect
    to x are those of the unpacked matrix, which exists only while they are computed, one matrix at
    a time. The weight is no parameter and not in the state_dict: it is made from the base
    checkpoint.
    """

    bias: Tensor | None

    def __init__(self, weight: ops.PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = weight
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def of(cls, linear: nn.Linear, format: str) -> QuantizedLinear:
        """Round a linear layer to `format`, "int4" or "int8".

        Raises:
            ValueError: a weight is infinite or NaN.
        """
        data = linear.weight.detach().float().contiguous().reshape(-1).view(torch.uint8).numpy()
        packed = ops.pack_weight(data, "F32", (linear.out_features, linear.in_features), format)
        return cls(packed, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _QuantizedProduct.apply(x, self.packed)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def dense(self) -> Tensor:
        """The matrix that the packed weight stands for, float32."""
        return torch.from_numpy(ops.unpack_weight(self.packed))


class LoraLinear(nn.Module):
    """A frozen linear layer with adapters, of which at most one is active.

    Attributes:
        base: the layer that was replaced.
        adapters: by name.
        active: name of the adapter in use, or None for the base alone.
    """

    def __init__(self, base: nn.Linear | QuantizedLinear) -> None:
        super().__init__()
        self.base = base
        self.base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.active is None:
            return y
        out: Tensor = self.adapters[self.active](y, x)
        return out

    def adapter(self, name: str) -> LowRank:
        """The adapter of this name."""
        found = self.adapters[name]
        assert isinstance(found, LowRank)
        return found

    def merged_weight(self) -> Tensor:
        """The weight that base and active adapter amount to, [out, in], float32."""
        base = self.base
        weight = base.dense() if isinstance(base, QuantizedLinear) else base.weight.float()
        return weight if self.active is None else weight + self.adapter(self.active).delta()


def default_targets(model: Qwen) -> tuple[str, ...]:
    """The names of all linear layers within the transformer's layers."""
    return _TARGETS[model.config.architecture]


def add_adapter(model: Qwen, config: LoraConfig, name: str = POLICY) -> None:
    """Freeze the model's own weights and put a new, active adapter beside its linear layers.

    Raises:
        ValueError: a target is not the name of a linear layer of the model.
    """
    for parameter_name, parameter in model.named_parameters():
        if ".adapters." not in parameter_name:
            parameter.requires_grad_(False)
    targets = config.targets or default_targets(model)
    known = {module_name.rsplit(".", 1)[-1] for module_name, _ in _linears(model)}
    for target in targets:
        if target not in known:
            names = ", ".join(sorted(known))
            raise ValueError(f"targets has {target!r}, expected names among {names}")
    for module_name, module in _linears(model):
        if module_name.rsplit(".", 1)[-1] not in targets:
            continue
        if not isinstance(module, LoraLinear):
            module = _replace(model, module_name, LoraLinear(module))
        out_features, in_features = module.base.out_features, module.base.in_features
        module.adapters[name] = LowRank(in_features, out_features, config)
    activate(model, name)


def quantize_base(model: Qwen, format: str) -> None:
    """Replace the linear layers within the transformer's layers by rounded, frozen ones (QLoRA).

    Embedding and head stay as they are, and so does what has been rounded already.

    Raises:
        ValueError: the format is not "int4" or "int8", or the model has adapters already.
    """
    if format not in QUANTIZED_FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(QUANTIZED_FORMATS)}")
    model.requires_grad_(False)
    for name, module in _linears(model):
        if isinstance(module, QuantizedLinear):
            continue
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is a {type(module).__name__}, expected a plain linear layer")
        _replace(model, name, QuantizedLinear.of(module, format))


def rounding(options: LoraOptions | None) -> Callable[[nn.Linear], nn.Module] | None:
    """What a model's linear layers become while it is loaded, see `Qwen.load`; None: nothing."""
    if options is None or options.quantize is None:
        return None
    return functools.partial(QuantizedLinear.of, format=options.quantize)


def _linears(model: Qwen) -> list[tuple[str, Any]]:
    """Names and modules of the linear layers, adapted or not, within the transformer's layers."""
    kinds = (nn.Linear, QuantizedLinear, LoraLinear)
    adapted = tuple(f"{name}." for name, module in lora_layers(model))
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, kinds) and name != "lm_head" and not name.startswith(adapted)
    ]


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLinear]]:
    """Names and modules of the adapted layers, in order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLinear)]


def _replace(model: nn.Module, name: str, module: Any) -> Any:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return module


def activate(model: nn.Module, name: str | None) -> None:
    """Make one adapter active in all layers that have it; None = the base alone."""
    for _, layer in lora_layers(model):
        layer.active = name if name is not None and name in layer.adapters else None


@contextlib.contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Make an adapter (None: the base alone) active within a `with` block."""
    before = [(layer, layer.active) for _, layer in lora_layers(model)]
    activate(model, name)
    try:
        yield
    finally:
        for layer, active in before:
            layer.active = active


def adapter_parameters(model: nn.Module, name: str = POLICY) -> list[nn.Parameter]:
    """The trainable matrices of one adapter."""
    layers = [layer for _, layer in lora_layers(model) if name in layer.adapters]
    return [p for layer in layers for p in layer.adapter(name).parameters()]


def knows_chat_tokens(model: Qwen) -> bool:
    """Whether the checkpoint was trained on the tokens of ChatML, by what its files say.

    The original Qwen states chat_format "raw" in the generation_config of its base models and
    "chatml" in that of its chat models; the later ones have a chat template.
    """
    if model.source is None:
        return False
    stated = model.source.generation_config.get("chat_format")
    if stated is not None:
        return bool(stated == "chatml")
    return model.source.chat_template is not None


def train_embeddings(model: Qwen) -> None:
    """Make the embedding and the head trainable in full beside the adapters."""
    model.embedding.weight.requires_grad_(True)
    model.head_weight.requires_grad_(True)


def prepare(model: Qwen, options: LoraOptions, say: Callable[[str], None]) -> None:
    """Freeze and, if asked for, quantise the model, and add the adapter that is trained.

    Raises:
        ValueError: a quantised base is asked for under torchrun.
    """
    if options.quantize is not None:
        if torch.distributed.is_initialized():
            raise ValueError(
                f"lora.quantize is {options.quantize}, which is trained on one process, but "
                "torchrun started it; expected null"
            )
        quantize_base(model, options.quantize)
    add_adapter(model, options)
    whole = options.embeddings == "train"
    if options.embeddings == "auto" and not knows_chat_tokens(model):
        whole = True
        say(
            "the checkpoint does not know the tokens of ChatML: its embedding and head are "
            "trained, too (lora.embeddings=freeze leaves them)"
        )
    if whole:
        train_embeddings(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = len(lora_layers(model))
    say(f"LoRA of rank {options.rank} on {layers} layers: {trained / 1e6:,.1f} M parameters")


def prepare_beside_reference(model: Qwen, options: LoraOptions, say: Callable[[str], None]) -> None:
    """As `prepare`, for a model whose bare base is the reference: only adapters may change.

    Raises:
        ValueError: the options ask for more.
    """
    if options.embeddings == "train":
        raise ValueError(
            "lora.embeddings is train, but the reference has the same ones; expected freeze"
        )
    prepare(model, dataclasses.replace(options, embeddings="freeze"), say)


def merged_tensors(model: Qwen, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, tensor) of the model with its active adapters merged in.

    One merged matrix is made at a time. Tensors that have no adapter and the right type are the
    model's own memory.

    Args:
        model: with adapters or without.
        dtype: of the tensors; None = that of the embedding.
    """
    dtype = dtype or model.embedding.weight.dtype
    adapted = {name: layer for name, layer in lora_layers(model)}
    rounded = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and not name.endswith(".base")
    }
    for name, layer in adapted.items():
        yield f"{name}.weight", layer.merged_weight().detach().to(dtype)
        if layer.base.bias is not None:
            yield f"{name}.bias", layer.base.bias.detach().to(dtype)
    for name, module in rounded.items():
        yield f"{name}.weight", module.dense().to(dtype)
        if module.bias is not None:
            yield f"{name}.bias", module.bias.detach().to(dtype)
    inside = tuple(f"{name}." for name in [*adapted, *rounded])
    for name, parameter in model.named_parameters():
        if not name.startswith(inside):
            yield name, parameter.detach().to(dtype)


def merge(model: Qwen) -> None:
    """Turn the active adapters and their bases into plain linear layers."""
    for name, layer in lora_layers(model):
        dense = nn.Linear(
            layer.base.in_features,
            layer.base.out_features,
            bias=layer.base.bias is not None,
            device="meta",
        )
        dtype = model.embedding.weight.dtype
        dense.weight = nn.Parameter(layer.merged_weight().detach().to(dtype))
        if layer.base.bias is not None:
            dense.bias = nn.Parameter(layer.base.bias.detach().to(dtype))
        _replace(model, name, dense)


def save_adapter(model: Qwen, folder: Path, name: str = POLICY, base: str = "") -> None:
    """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

    Embedding and head are written with it when they are trainable.

    Args:
        model: has the adapter.
        folder: made if it is missing; files there are overwritten.
        name: of the adapter.
        base: name or path of the base model, for the record.
    """
    layers = [(n, layer) for n, layer in lora_layers(model) if name in layer.adapters]
    if not layers:
        raise ValueError(f"the model has no adapter {name!r}")
    tensors = {}
    for module_name, layer in layers:
        adapter = layer.adapter(name)
        tensors[f"{_PREFIX}{module_name}.lora_A.weight"] = adapter.lora_A.detach().cpu()
        tensors[f"{_PREFIX}{module_name}.lora_B.weight"] = adapter.lora_B.detach().cpu()
    saved_whole = [n for n, p in _embeddings(model) if p.requires_grad]
    for module_name, parameter in _embeddings(model):
        if parameter.requires_grad:
            tensors[f"{_PREFIX}{module_name}.weight"] = parameter.detach().cpu()
            if model.config.tie_word_embeddings:  # PEFT wants the tied head as well
                tensors[f"{_PREFIX}lm_head.weight"] = parameter.detach().cpu().clone()
    rank, scale = layers[0][1].adapter(name).lora_A.shape[0], layers[0][1].adapter(name).scale
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": layers[0][1].adapter(name).dropout,
        "target_modules": sorted({n.rsplit(".", 1)[-1] for n, _ in layers}),
        "modules_to_save": [n.rsplit(".", 1)[-1] for n in saved_whole] or None,
        "ensure_weight_tying": bool(saved_whole) and model.config.tie_word_embeddings,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS_FILE, {"format": "pt"})
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / _CONFIG_FILE).write_text(text, encoding="utf-8")


def save_policy(model: Qwen, folder: Path, base: str) -> None:
    """Write the adapter if the model has one, else the model as a Hugging Face folder."""
    if lora_layers(model):
        save_adapter(model, folder, base=base)
    else:
        model.save(folder)


def _embeddings(model: Qwen) -> list[tuple[str, Tensor]]:
    """Names and weights of the embedding and, where it is another matrix, of the head."""
    names = {id(module): name for name, module in model.named_modules()}
    found = [(names[id(model.embedding)], model.embedding.weight)]
    if not model.config.tie_word_embeddings:
        found.append(("lm_head", model.head_weight))
    return found


def load_adapter(model: Qwen, folder: Path, name: str = POLICY) -> None:
    """Add an adapter that PEFT or `save_adapter` wrote and make it active.

    Raises:
        CheckpointError: the files are missing or damaged, use a variant of LoRA that is not
            supported, or do not fit the model.
    """
    config = read_json_object(folder / _CONFIG_FILE, _MAX_CONFIG_BYTES)
    lora = _checked_config(folder / _CONFIG_FILE, config)
    path = folder / _WEIGHTS_FILE
    tensors = read_tensors(path)
    _drop_tied_head(model, path, tensors)
    present = {n.removeprefix(_PREFIX) for n in tensors}
    targets = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in present if ".lora_" in n}
    try:
        add_adapter(model, LoraConfig(lora.rank, lora.alpha, lora.dropout, tuple(targets)), name)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    places: dict[str, Tensor] = {}
    for module_name, layer in lora_layers(model):
        if name in layer.adapters:
            places[f"{module_name}.lora_A.weight"] = layer.adapter(name).lora_A
            places[f"{module_name}.lora_B.weight"] = layer.adapter(name).lora_B
    whole = {f"{n}.weight": p for n, p in _embeddings(model)}
    for tensor_name in sorted(places.keys() | present):
        if tensor_name not in present:
            raise CheckpointError(f"{path}: tensor {_PREFIX}{tensor_name} is missing")
        place = places.get(tensor_name, whole.get(tensor_name))
        if place is None:
            raise CheckpointError(f"{path}: tensor {tensor_name} is not part of the model")
        value = tensors[_PREFIX + tensor_name]
        if value.shape != place.shape:
            raise CheckpointError(
                f"{path}: tensor {tensor_name} is {tuple(value.shape)}, "
                f"expected {tuple(place.shape)}"
            )
        with torch.no_grad():
            place.copy_(value)
        if tensor_name in whole:
            place.requires_grad_(True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file in float32.

    Raises:
        CheckpointError: it is missing or damaged, or has a type other than F32, F16 and BF16.
    """
    sources, _ = read_safetensors(path)
    tensors = {}
    for name, source in sources.items():
        if source.dtype not in FLOAT_TYPES:
            raise CheckpointError(f"{path}: tensor {name} is {source.dtype}, expected a float type")
        shape = source.shape if len(source.shape) == 2 else (1, math.prod(source.shape))
        values = ops.decode_source(source.data, source.dtype, (shape[0], shape[1]))
        tensors[name] = torch.from_numpy(values).reshape(source.shape)
    return tensors


def _drop_tied_head(model: Qwen, path: Path, tensors: dict[str, Tensor]) -> None:
    """Remove the copy of a tied embedding that PEFT writes as the head."""
    head, embedding = f"{_PREFIX}lm_head.weight", f"{_PREFIX}model.embed_tokens.weight"
    if not model.config.tie_word_embeddings or head not in tensors:
        return
    if embedding not in tensors or not torch.equal(tensors.pop(head), tensors[embedding]):
        raise CheckpointError(
            f"{path}: tensor {head} is not {embedding}, expected the same, as the model ties them"
        )


def _checked_config(path: Path, config: Mapping[str, Any]) -> LoraConfig:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias"):
        if config.get(key):
            raise CheckpointError(f"{path}: {key} is {config[key]!r}, which is not supported")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {config['bias']!r}, expected 'none'")
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0)
    if not isinstance(rank, int):
        raise CheckpointError(f"{path}: r is {rank!r}, expected an integer")
    if not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{path}: lora_alpha is {alpha!r}, expected a number")
    if not isinstance(dropout, (int, float)):
        raise CheckpointError(f"{path}: lora_dropout is {dropout!r}, expected a number")
    if config.get("use_rslora"):  # alpha / sqrt(rank), arXiv 2312.03732
        alpha = alpha * math.sqrt(rank)
    try:
        return LoraConfig(rank, float(alpha), float(dropout))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
