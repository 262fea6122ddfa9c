"""What every training command does around its loop: options, model, estimates, result."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from qwen_native.checkpoint import Checkpoint, open_checkpoint
from qwen_native.config import ModelConfig
from qwen_native.export import save_folder
from qwen_native.hub import resolve_model
from qwen_native.nn import Qwen
from qwen_native.packed_cache import load_tokenizer as tokenizer_of
from qwen_native.token_files import byte_tokenizer_json
from qwen_native.tokenizer import Tokenizer
from qwen_native.train.checkpoint import checkpoints
from qwen_native.train.config import (
    ModelOptions,
    OptimOptions,
    RunOptions,
    ShapeOptions,
    as_dict,
    load_config,
)
from qwen_native.train.data import Source
from qwen_native.train.distributed import World, shard, whole_state, world
from qwen_native.train.metrics import Metrics, available_memory, matrix_peak
from qwen_native.train.process import prepare_process
from qwen_native.train.trainer import Trainer, model_flops

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_VOCAB_MULTIPLE = 64
_TYPICAL_PEAK_SHARE = 0.4


class Config(Protocol):
    """What the configurations of all commands have."""

    @property
    def model(self) -> ModelOptions: ...

    @property
    def optim(self) -> OptimOptions: ...

    @property
    def run(self) -> RunOptions: ...


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Plan:
    """What a command made of its data.

    Attributes:
        source: the samples.
        steps: optimiser steps of the whole run.
        context: tokens of the longest sample.
    """

    source: Source
    steps: int
    context: int


Say = Callable[[str], None]
Planner = Callable[[C, Tokenizer, World, Say], Plan]
Prepare = Callable[[C, Qwen, Say], nn.Module]
Save = Callable[[C, nn.Module, Path], None]


def parse(
    kind: type[C], argv: Sequence[str], name: str, description: str, examples: str
) -> tuple[C, argparse.Namespace]:
    """Read a training command's line: [recipe.yaml] [key=value ...] [--resume] [--estimate]."""
    parser = argparse.ArgumentParser(
        prog=f"qwen-native train {name}",
        description=description,
        epilog=f"examples:{examples.rstrip()}\n\nkeys:\n{_describe(kind)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file; recipes/ has some")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="instead of the recipe's")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--estimate", action="store_true", help="only say what the run would need")
    options = parser.parse_intermixed_args(argv)
    overrides = list(options.overrides)
    if options.recipe is not None and "=" in options.recipe:
        overrides.insert(0, options.recipe)
        options.recipe = None
    recipe = None if options.recipe is None else Path(options.recipe)
    return load_config(kind, recipe, overrides), options


def _describe(kind: type[Any], prefix: str = "  ") -> str:
    """The keys of a configuration with their defaults and what their docstring says."""
    documented = dict(_ATTRIBUTE.findall(kind.__doc__ or ""))
    lines = []
    for field in dataclasses.fields(kind):
        name = str(field.type).removesuffix(" | None")
        if name in _SECTIONS:
            lines += [f"{prefix}{field.name}:", _describe(_SECTIONS[name], prefix + "  ")]
            continue
        missing = field.default is dataclasses.MISSING
        value = "required" if missing else f"default {field.default}"
        meaning = " ".join(documented.get(field.name, "").split())
        text = f"{field.name} ({value}){': ' + meaning if meaning else ''}"
        inner = prefix + "  "
        lines.append(textwrap.fill(text, 96, initial_indent=prefix, subsequent_indent=inner))
    return "\n".join(lines)


_ATTRIBUTE = re.compile(r"^        (\w+): (.*(?:\n            .*)*)", re.MULTILINE)
_SECTIONS: dict[str, type[Any]] = {
    "ModelOptions": ModelOptions,
    "ShapeOptions": ShapeOptions,
    "OptimOptions": OptimOptions,
    "RunOptions": RunOptions,
}


def section(kind: type[Any]) -> type[Any]:
    """Decorator: the help of the commands lists this dataclass's keys."""
    _SECTIONS[kind.__name__] = kind
    return kind


def whole_model(config: Config, model: Qwen, say: Say) -> nn.Module:
    """What is trained where nothing is added to the model: all of it."""
    return model


def run(
    config: C,
    options: argparse.Namespace,
    plan: Planner[C],
    *,
    prepare: Prepare[C] = whole_model,
    trainer: type[Trainer] = Trainer,
    save: Save[C] | None = None,
    convert: Callable[[nn.Linear], nn.Module] | None = None,
) -> int:
    """Train as configured, from the data to the exported model in `run.folder`/model.

    Args:
        config: the recipe.
        options: of the command line.
        plan: reads the data.
        prepare: makes of the model what is trained: parameters that are added or frozen. Under
            torchrun it is called for a model on the meta device, too.
        trainer: what trains it.
        save: writes the result into a folder; default: as a Hugging Face folder.
        convert: of linear layers while the model is loaded, see `Qwen.load`.
    """
    with world() as processes:
        folder = Path(config.run.folder)
        used = checkpoints(folder) or (folder / "model").exists()
        if used and not options.resume and not options.estimate:
            raise ValueError(f"{folder}: has a run already; give --resume or another run.folder")
        metrics = Metrics(folder, processes.is_main, config.run.tensorboard)
        torch.manual_seed(config.run.seed)
        tokenizer, files = open_tokenizer(config.model, folder, processes)
        planned = plan(config, tokenizer, processes, metrics.say)
        design = Design.of(config.model, tokenizer, planned.context, processes.device, convert)
        made = functools.partial(prepare, config)
        if processes.distributed:
            trained = design.sharded(made, metrics.say, processes)
        else:
            trained = made(design.whole(), metrics.say).to(processes.device)
        limit = config.run.micro_batch_tokens or planned.context
        estimate(
            trained,
            design.config,
            config,
            planned.steps,
            planned.context,
            limit,
            model_flops(design.empty(), planned.context),
            processes,
            metrics,
        )
        if options.estimate:
            return 0
        if processes.is_main:
            (folder / "config.json").write_text(json.dumps(as_dict(config), indent=2) + "\n")
        loop = trainer(
            trained, planned.source, config.optim, config.run, processes,
            planned.steps, limit, metrics,
        )  # fmt: skip
        # From here on every process has random numbers of its own.
        torch.manual_seed(config.run.seed + processes.rank)
        if options.resume:
            loop.resume()
        else:
            metrics.restart()
        loop.train()
        state = whole_state(trained) if processes.distributed else None
        if processes.is_main and not (folder / "model").exists():
            result = trained if state is None else design.filled(made, state)
            if save is not None:
                save(config, result, folder / "model")
            else:
                assert isinstance(result, Qwen)
                export(result, folder / "model", files, config.model.precision)
        processes.barrier()
        metrics.say(f"done: the model is in {folder / 'model'}")
    return 0


def open_tokenizer(
    options: ModelOptions, folder: Path, processes: World
) -> tuple[Tokenizer, Path | None]:
    """The tokenizer, and the folder of its files unless they are the checkpoint's own."""
    if options.tokenizer is None:
        checkpoint = open_checkpoint(resolve_model(_path(options)))
        tokenizer = tokenizer_of(checkpoint)
        if tokenizer is None:
            raise ValueError(f"{options.path}: has no tokenizer, expected one in model.tokenizer")
        return tokenizer, None
    files = Path(options.tokenizer)
    if options.tokenizer == "bytes":
        files = folder / "tokenizer"
        if processes.is_main:
            files.mkdir(parents=True, exist_ok=True)
            (files / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
        processes.barrier()
    tokenizer = Tokenizer.from_folder(files)
    if tokenizer is None:
        raise ValueError(f"model.tokenizer is {options.tokenizer}, which has no tokenizer files")
    return tokenizer, files


def _path(options: ModelOptions) -> str | None:
    return None if options.path == "demo" else options.path


@dataclass(frozen=True)
class Design:
    """A model that can be made: of a checkpoint, or a new one.

    Attributes:
        options: of the recipe.
        config: its shape.
        checkpoint: where its parameters come from; None for random ones.
        convert: of linear layers while the checkpoint is loaded, see `Qwen.load`.
    """

    options: ModelOptions
    config: ModelConfig
    checkpoint: Checkpoint | None
    convert: Callable[[nn.Linear], nn.Module] | None

    @classmethod
    def of(
        cls,
        options: ModelOptions,
        tokenizer: Tokenizer,
        context: int,
        device: torch.device,
        convert: Callable[[nn.Linear], nn.Module] | None = None,
    ) -> Design:
        """Check that the model can be trained here, and set the process up for it.

        Args:
            options: of the recipe.
            tokenizer: of the data.
            context: tokens of the longest sample.
            device: where the model will be.
            convert: see the attribute.

        Raises:
            ValueError: the kernels do not run on the device, or the vocabulary is too small.
        """
        if device.type != "cpu" and options.kernels == "native":
            raise ValueError(
                f"model.kernels is native, which computes on the CPU, but the run is on "
                f"{device}; expected reference"
            )
        prepare_process(device, options.kernels, _DTYPES[options.precision])
        checkpoint = None if options.shape else open_checkpoint(resolve_model(_path(options)))
        config = checkpoint.config if checkpoint else new_config(options, tokenizer, context)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}"
            )
        return cls(options, config, checkpoint, convert)

    def whole(self, dtype: torch.dtype | None = None) -> Qwen:
        """The model on the CPU, by default in the recipe's precision."""
        dtype = dtype or _DTYPES[self.options.precision]
        if self.checkpoint is not None:
            model = Qwen.load(self.checkpoint.path, dtype, self.options.kernels, self.convert)
        else:
            model = Qwen(self.config, self.options.kernels).to(dtype)
        return self._set(model)

    def empty(self, dtype: torch.dtype | None = None) -> Qwen:
        """The same on the meta device, without parameters' values."""
        with torch.device("meta"):
            model = Qwen(self.config, self.options.kernels)
        model.source = self.checkpoint
        return self._set(model.to(dtype or _DTYPES[self.options.precision]))

    def _set(self, model: Qwen) -> Qwen:
        model.activation_checkpointing = self.options.activation_checkpointing
        model.dropout = self.options.dropout
        return model

    def sharded(
        self, prepare: Callable[[Qwen, Say], nn.Module], say: Say, processes: World
    ) -> nn.Module:
        """What `prepare` makes of the model, spread over the processes.

        Only the main process ever holds the whole model. Sharded parameters stay float32; FSDP
        rounds them for the computation.
        """
        state = {}
        if processes.is_main:
            state = dict(prepare(self.whole(torch.float32), say).state_dict())
        model = self._prepared_empty(prepare, torch.float32)
        shard(model, state, processes, self.options.precision)
        return model

    def filled(
        self, prepare: Callable[[Qwen, Say], nn.Module], state: dict[str, torch.Tensor]
    ) -> nn.Module:
        """What `prepare` makes of the model with the parameters of a state, in the precision."""
        model = self._prepared_empty(prepare, _DTYPES[self.options.precision])
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        rounded = {name: tensor.to(dtypes[name]) for name, tensor in state.items()}
        model.load_state_dict(rounded, assign=True)
        return model

    def _prepared_empty(
        self, prepare: Callable[[Qwen, Say], nn.Module], dtype: torch.dtype
    ) -> nn.Module:
        with torch.device("meta"):
            return prepare(self.empty(dtype), lambda text: None)


def open_model(
    options: ModelOptions,
    tokenizer: Tokenizer,
    context: int,
    processes: World,
    convert: Callable[[nn.Linear], nn.Module] | None = None,
) -> Qwen:
    """Load or make the model, in its precision, on its device, for one process; see `Design`."""
    design = Design.of(options, tokenizer, context, processes.device, convert)
    return design.whole().to(processes.device)


def new_config(options: ModelOptions, tokenizer: Tokenizer, context: int) -> ModelConfig:
    """The `ModelConfig` of a new model: the defaults of its generation where nothing is said."""
    shape = options.shape
    assert shape is not None
    head_dim = shape.head_dim or shape.hidden_size // shape.num_heads
    rounded = -(-tokenizer.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    return ModelConfig(
        architecture=shape.architecture,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads or shape.num_heads,
        head_dim=head_dim,
        vocab_size=shape.vocab_size or rounded,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        rope_dim=head_dim,
        max_position_embeddings=shape.max_position_embeddings or context,
        tie_word_embeddings=shape.tie_word_embeddings,
        qkv_bias=shape.architecture != "qwen3",
        qk_norm=shape.architecture == "qwen3",
        sliding_window=None,
        max_window_layers=shape.num_layers,
        yarn=None,
        use_dynamic_ntk=shape.architecture == "qwen",
        use_logn_attn=shape.architecture == "qwen",
        seq_length=context if shape.architecture == "qwen" else 0,
    )


def estimate(
    trained: nn.Module,
    shape: ModelConfig,
    config: Config,
    steps: int,
    context: int,
    limit: int,
    flops: float,
    processes: World,
    metrics: Metrics,
) -> None:
    """Say, before anything is computed, what memory and time the run will take.

    Args:
        trained: with its frozen parameters.
        shape: of the model.
        config: the recipe.
        steps: of the run.
        context: tokens of the longest sample.
        limit: most tokens of a micro-batch.
        flops: of training all of the model on one token; frozen matrices save a third.
        processes: that train together.
        metrics: says it.

    Raises:
        ValueError: the parameters and the optimiser alone do not fit into memory.
    """
    parameters = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in trained.parameters() if not p.requires_grad)
    packed: list[Any] = [getattr(module, "packed", None) for module in trained.modules()]
    frozen += sum(int(weight.nbytes) for weight in packed if weight is not None)  # QLoRA's base
    narrow = config.model.precision == "bf16" and not processes.distributed
    state = (parameters * 16 + frozen) / processes.size
    element = 2 if config.model.precision == "bf16" else 4
    rows = shape.head_dim * (3 * shape.num_heads + 4 * shape.num_kv_heads)
    layer = 4 * shape.hidden_size + rows + 3 * shape.intermediate_size
    kept = shape.num_layers * (
        shape.hidden_size if config.model.activation_checkpointing else layer
    )
    activations = max(limit, context) * (kept + layer) * element
    dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
    peak = matrix_peak(dtype, processes.device) * processes.size
    per_token = flops * 2 / 3 if frozen else flops
    metrics.peak_per_token = per_token / peak
    tokens = steps * config.run.batch_size * context
    hours = tokens * per_token / (_TYPICAL_PEAK_SHARE * peak) / 3600
    metrics.say(
        f"{parameters / 1e6:,.1f} M parameters are trained; memory per process about "
        f"{(state + activations) / 1e9:.2f} GB: {state / 1e9:.2f} for parameters"
        f"{' and their float32 copies' if narrow else ''}, gradients and optimiser, "
        f"{activations / 1e9:.2f} for activations\n"
        f"{steps} steps, at most {_count(tokens)} tokens; about {_duration(hours)} at "
        f"{100 * _TYPICAL_PEAK_SHARE:.0f} % of the matrix peak ({peak / 1e9:,.0f} GFLOP/s)"
    )
    free = available_memory()
    if processes.device.type == "cpu" and free and parameters * 14 / processes.size > free:
        raise ValueError(
            f"the run needs {state / 1e9:.1f} GB for parameters and optimiser, "
            f"but only {free / 1e9:.1f} GB are free"
        )


def _count(tokens: int) -> str:
    return f"{tokens / 1e6:,.1f} M" if tokens >= 1e6 else f"{tokens:,}"


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.0f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{math.ceil(hours * 60)} minutes"


def export(model: Qwen, folder: Path, tokenizer: Path | None, precision: str) -> None:
    """Write the trained model as a Hugging Face folder, in its precision."""
    state = {name: tensor.to(_DTYPES[precision]) for name, tensor in model.state_dict().items()}
    save_folder(folder, model.config, state, model.source, tokenizer)
