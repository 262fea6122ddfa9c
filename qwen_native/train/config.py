"""Training configurations: YAML into dataclasses, every key and every type checked.

A recipe is a YAML file whose sections are the fields of a dataclass; `key=value` on the command
line replaces single values (`optim.learning_rate=1e-5`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from qwen_native.errors import quoted

T = TypeVar("T")


def check_range(options: object, **limits: tuple[float, float]) -> None:
    """Raise ValueError naming the first field of `options` outside its (low, high)."""
    for name, (low, high) in limits.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}, expected {low:g} to {high:g}")


@dataclass(frozen=True)
class ShapeOptions:
    """A new model's shape; see `qwen_native.config.ModelConfig`.

    Attributes:
        num_kv_heads: default: num_heads.
        head_dim: default: hidden_size / num_heads.
        vocab_size: default: the tokenizer's, rounded up to a multiple of 64.
        max_position_embeddings: default: the context of the training.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    architecture: Literal["qwen", "qwen2", "qwen3"] = "qwen2"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        check_range(self, hidden_size=(1, 1 << 20), num_heads=(1, 1 << 12))
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, expected a multiple of num_heads "
                f"{self.num_heads}, or head_dim"
            )
        if self.architecture == "qwen":
            fixed: dict[str, tuple[object, ...]] = {
                "num_kv_heads": (None, self.num_heads),
                "tie_word_embeddings": (False,),
                "head_dim": (None, self.hidden_size // self.num_heads),
            }
            for name, allowed in fixed.items():
                if getattr(self, name) not in allowed:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, which architecture qwen does not have; "
                        "expected qwen2 or qwen3"
                    )


@dataclass(frozen=True)
class ModelOptions:
    """Which model is trained, and how it is computed.

    Attributes:
        path: a checkpoint folder, .gguf file or Hugging Face id; "demo" for the demo model.
        shape: instead of a path: a new model with random parameters.
        tokenizer: a folder with tokenizer files, or "bytes"; default: the checkpoint's own.
        precision: of parameters and activations. "bf16" keeps float32 master parameters and
            moments in the optimiser (16 bytes per parameter in all, as "fp32").
        kernels: "native" for the package's own, which compute on the CPU; "reference" for plain
            torch.
        activation_checkpointing: less memory for about a third more time.
        dropout: of the embeddings and of what each layer adds to the residual stream.
    """

    path: str | None = None
    shape: ShapeOptions | None = None
    tokenizer: str | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    kernels: Literal["native", "reference"] = "native"
    activation_checkpointing: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, dropout=(0.0, 0.99))
        if (self.path is None) == (self.shape is None):
            raise ValueError("model needs either path or shape")
        if self.path is None and self.tokenizer is None:
            raise ValueError("model.tokenizer is missing, which a new model needs")


@dataclass(frozen=True)
class OptimOptions:
    """AdamW and its learning rate.

    Attributes:
        learning_rate: the peak.
        schedule: after the warm-up: "cosine" down to `final_ratio` of the peak at the last step,
            or "constant".
        warmup_steps: linear ramp from 0 (the first step has 1 / warmup_steps of the peak).
        warmup_ratio: instead: this share of all steps, rounded up.
        weight_decay: decoupled, on matrices only (not on norms and biases).
        clip_norm: largest norm of the whole gradient; 0 does not clip.
    """

    learning_rate: float
    schedule: Literal["cosine", "constant"] = "cosine"
    final_ratio: float = 0.1
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_range(
            self,
            learning_rate=(0.0, 10.0),
            final_ratio=(0.0, 1.0),
            warmup_steps=(0, math.inf),
            warmup_ratio=(0.0, 1.0),
            beta1=(0.0, 0.999999),
            beta2=(0.0, 0.999999),
            eps=(1e-30, 1.0),
            weight_decay=(0.0, 10.0),
            clip_norm=(0.0, math.inf),
        )
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are both given, expected one of them")


@dataclass(frozen=True)
class RunOptions:
    """The loop: how long, how much at a time, and what is kept.

    Attributes:
        folder: metrics, checkpoints and the result go here.
        steps: optimiser steps; for fine-tuning 0 means `epochs`.
        epochs: passes over the data where steps is 0.
        batch_size: sequences (conversations when fine-tuning) of one step, on all processes
            together.
        micro_batch_tokens: most tokens that go through the model at once; a step's batch is cut
            into such parts, whose gradients add up. 0: the context. A longer sequence goes alone.
        seed: of parameters, data order and dropout.
        save_every: steps between checkpoints; 0: only at the end.
        keep_checkpoints: the newest ones that stay.
        eval_every: steps between evaluations of the validation data, if there is any, the first one
            before any step; 0: at the end only.
        tensorboard: also write TensorBoard events.
    """

    folder: str
    steps: int = 0
    epochs: int = 1
    batch_size: int = 8
    micro_batch_tokens: int = 0
    seed: int = 1234
    save_every: int = 1000
    keep_checkpoints: int = 10
    eval_every: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        at_least_0 = dict.fromkeys(
            ("steps", "micro_batch_tokens", "save_every", "eval_every"), (0, math.inf)
        )
        at_least_1 = dict.fromkeys(("epochs", "batch_size", "keep_checkpoints"), (1, math.inf))
        check_range(self, **at_least_0, **at_least_1, seed=(0, 2**62))


def load_config(
    kind: type[T], recipe: Path | None, overrides: Sequence[str], where: str = "command line"
) -> T:
    """Read a recipe, apply the overrides and check everything.

    Args:
        kind: the dataclass to build.
        recipe: a YAML file, or None for overrides only.
        overrides: "section.key=value"; the value is YAML.
        where: what messages call the overrides.

    Raises:
        ValueError: an unknown or missing key, or a value of the wrong type; the message names it.
    """
    values: Any = {}
    if recipe is not None:
        try:
            values = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{recipe}: cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{recipe}: is {quoted(values)}, expected keys with values")
        where = f"{recipe} and {where}" if overrides else str(recipe)
    for override in overrides:
        path, sign, text = override.partition("=")
        if not sign or not path:
            raise ValueError(f"{quoted(override)} is not an override, expected key=value")
        section = values
        *outer, last = path.split(".")
        for name in outer:
            inner = section.setdefault(name, {})
            if inner is None:
                inner = section[name] = {}
            if not isinstance(inner, dict):
                raise ValueError(f"{path}: {name} is {quoted(inner)}, which has no keys inside")
            section = inner
        try:
            section[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: value {quoted(text)} is not YAML") from error
    return build(kind, values, where)


def build(kind: type[T], values: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """Build the dataclass `kind` from parsed YAML; messages begin with `where`."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, 1, 0.0)
            raise ValueError(
                f"{where}: {prefix}{key} is not a known key; the nearest is {prefix}{close[0]}"
            )
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], where, prefix + name)
        elif _required(field):
            raise ValueError(f"{where}: {prefix}{name} is missing")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    """Check a value against its annotation; whole numbers are numbers, "3e-4" is a number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _convert(next(t for t in inner if t is not type(None)), value, where, name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {name} is {quoted(value)}, expected keys with values")
        return build(hint, value, where, name + ".")
    if origin is Literal:
        if value in inner and type(value) in {type(choice) for choice in inner}:
            return value
        raise ValueError(
            f"{where}: {name} is {quoted(value)}, expected one of {', '.join(map(str, inner))}"
        )
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(
            _convert(inner[0], item, where, f"{name}[{i}]") for i, item in enumerate(items)
        )
    if hint is float and (number := _number(value)) is not None:
        return number
    if hint is int and (number := _number(value)) is not None and number == int(number):
        return int(number)
    if hint in (bool, str) and type(value) is hint:
        return value
    kinds = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    raise ValueError(f"{where}: {name} is {quoted(value)}, expected {kinds[hint]}")


def _number(value: Any) -> float | None:
    """YAML 1.1 reads 3e-4 as a text."""
    if type(value) not in (int, float, str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, for files."""
    return dataclasses.asdict(config)
