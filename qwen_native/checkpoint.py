"""Opens a checkpoint: one view of Hugging Face folders and of GGUF files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_native.config import ModelConfig
from qwen_native.config_fields import Fields
from qwen_native.config_gguf import config_from_gguf
from qwen_native.config_hf import config_from_hf
from qwen_native.errors import CheckpointError, located, quoted
from qwen_native.files import MappedFile, read_json_object, read_text
from qwen_native.gguf import read_gguf
from qwen_native.group_quantized import dense_tensors, group_scheme
from qwen_native.safetensors import read_safetensors, read_sharded_safetensors
from qwen_native.tensor_names import (
    GGUF_QWEN,
    GGUF_QWEN2,
    HF_QWEN,
    HF_QWEN2,
    canonical_tensors,
)
from qwen_native.tensor_source import TensorSource

_MAX_JSON_BYTES = 1 << 24
_MAX_TEMPLATE_BYTES = 1 << 20
_TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

_GGUF_SAMPLING_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_GGUF_CONTROL_TOKEN = 3
_GGUF_END_TOKENS = (b"<|im_end|>", b"<|endoftext|>")


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An open checkpoint. Its tensors are views of mapped files, valid as long as they live.

    Attributes:
        path: the folder, or the GGUF file.
        kind: "hf" or "gguf".
        config: the model's shape and switches.
        tensors: by canonical name, exactly those of `tensor_names.expected_shapes(config)`; types
            F32, F16, BF16 or a GGUF block format, norms and biases always a float type.
        metadata: the parsed config.json, or the GGUF metadata as `read_gguf` returns it.
        generation_config: keys of Hugging Face's generation_config.json. Without that file, the
            token ids and sampling defaults that config.json or the GGUF metadata state; may be
            empty. `eos_token_id` is always a list; other values are as the file has them.
        chat_template: Jinja source, or None.
    """

    path: Path
    kind: str
    config: ModelConfig
    tensors: dict[str, TensorSource]
    metadata: dict[str, Any]
    generation_config: dict[str, Any]
    chat_template: str | None
    _files: tuple[MappedFile, ...]

    def release(self, tensor: TensorSource, begin: int = 0, end: int | None = None) -> None:
        """Drop the resident pages of a tensor's bytes [begin, end) that are not needed any more.

        Without it the resident set would hold the source beside the packed copy. The data stay
        readable; touching them reads the file again.
        """
        if tensor.file is None:
            return
        file = next(file for file in self._files if file.path == tensor.file)
        file.release(tensor.data[begin:end])

    def forget_vocabulary(self) -> None:
        """Drop the vocabulary in the GGUF metadata, which is large, once it has been read."""
        for key in ("tokens", "merges", "token_type", "scores"):
            self.metadata.pop(f"tokenizer.ggml.{key}", None)
        for file in self._files:
            file.release(file.bytes)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face folder (config.json and safetensors) or a .gguf file.

    Raises:
        CheckpointError: nothing usable is there, a file is damaged, the model is not supported, or
            a tensor is missing, unexpected, mis-shaped or of an unsupported type.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _open_folder(path)
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: does not exist, expected a model folder or a .gguf file")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: is a file, expected a model folder or a .gguf file")
    return _open_gguf(path)


def _open_folder(folder: Path) -> Checkpoint:
    if not os.path.exists(folder / "config.json"):
        raise CheckpointError(f"{folder}: has no config.json{_gguf_hint(folder)}")
    metadata = read_json_object(folder / "config.json", _MAX_JSON_BYTES)
    with located(folder / "config.json"):
        config = config_from_hf(metadata)
        scheme = group_scheme(metadata)
    found, files = _read_folder_tensors(folder)
    with located(folder):
        if scheme is not None:
            found = dense_tensors(found, scheme)
        config, found = _resolve_tie(config, found)
        names = HF_QWEN if config.architecture == "qwen" else HF_QWEN2
        tensors = canonical_tensors(found, config, names)
    generation_config = _folder_generation_config(folder, metadata)
    return Checkpoint(
        path=folder,
        kind="hf",
        config=config,
        tensors=tensors,
        metadata=metadata,
        generation_config=generation_config,
        chat_template=_folder_chat_template(folder),
        _files=tuple(files),
    )


def _gguf_hint(folder: Path) -> str:
    files = sorted(folder.glob("*.gguf"))
    return f"; to use a GGUF file, name it, such as {files[0]}" if files else ""


def _read_folder_tensors(folder: Path) -> tuple[dict[str, TensorSource], list[MappedFile]]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.exists(single):
        tensors, file = read_safetensors(single)
        return tensors, [file]
    if os.path.exists(index):
        return read_sharded_safetensors(index)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            f"{folder}: has only PyTorch pickles, expected model.safetensors; "
            "convert it with transformers: model.save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(
        f"{folder}: has neither model.safetensors nor model.safetensors.index.json"
        f"{_gguf_hint(folder)}"
    )


def _resolve_tie(
    config: ModelConfig, found: dict[str, TensorSource]
) -> tuple[ModelConfig, dict[str, TensorSource]]:
    """Settle a config that ties the embeddings while the file has an lm_head.weight, too.

    As in transformers: an equal copy is dropped, a different one means that nothing is tied.
    """
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or head is None or embedding is None:
        return config, found
    if head.dtype == embedding.dtype and head.data.data == embedding.data.data:
        return config, {name: t for name, t in found.items() if t is not head}
    return dataclasses.replace(config, tie_word_embeddings=False), found


def _folder_generation_config(folder: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / "generation_config.json"
    if os.path.exists(path):
        generation_config = read_json_object(path, _MAX_JSON_BYTES)
    else:
        path = folder / "config.json"
        generation_config = {key: metadata[key] for key in _TOKEN_ID_KEYS if key in metadata}
    with located(path):
        _normalise_eos(generation_config)
    return generation_config


def _normalise_eos(generation_config: dict[str, Any]) -> None:
    """Make eos_token_id a list of token ids; absent and null stay away."""
    eos = generation_config.pop("eos_token_id", None)
    if eos is None:
        return
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
        raise CheckpointError(f"eos_token_id is {quoted(eos)}, expected token ids")
    generation_config["eos_token_id"] = ids


def _folder_chat_template(folder: Path) -> str | None:
    """chat_template.jinja, else the (default) chat_template of tokenizer_config.json."""
    if os.path.exists(folder / "chat_template.jinja"):
        return read_text(folder / "chat_template.jinja", _MAX_TEMPLATE_BYTES)
    path = folder / "tokenizer_config.json"
    if not os.path.exists(path):
        return None
    template = read_json_object(path, _MAX_JSON_BYTES).get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template is {quoted(template)}, expected a string")
    return template


def _open_gguf(path: Path) -> Checkpoint:
    metadata, found, file = read_gguf(path)
    with located(path):
        parts = Fields(metadata).integer("split.count", default=1)
        if parts > 1:
            raise CheckpointError(
                f"is one of {parts} parts, expected a whole model; "
                "join them with llama.cpp's gguf-split --merge"
            )
        embedding = found.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError("tensor 'token_embd.weight' is missing")
        config = config_from_gguf(
            metadata,
            vocab_size=embedding.shape[0],
            tie_word_embeddings="output.weight" not in found,
        )
        names = GGUF_QWEN if config.architecture == "qwen" else GGUF_QWEN2
        tensors = canonical_tensors(found, config, names)
        generation_config = _gguf_generation_config(metadata)
        chat_template = metadata.get("tokenizer.chat_template")
        if chat_template is not None and not isinstance(chat_template, str):
            raise CheckpointError(
                f"tokenizer.chat_template is {quoted(chat_template)}, expected a string"
            )
    return Checkpoint(
        path=path,
        kind="gguf",
        config=config,
        tensors=tensors,
        metadata=metadata,
        generation_config=generation_config,
        chat_template=chat_template,
        _files=(file,),
    )


def _gguf_generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids and sampling defaults under Hugging Face's keys.

    GGUF names one end token, Hugging Face's chat checkpoints stop at <|im_end|> and at
    <|endoftext|>. Both are added when the vocabulary marks them as control tokens.
    """
    fields = Fields(metadata, prefix="tokenizer.ggml.")
    config: dict[str, Any] = {}
    for name, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if (token := fields.optional_integer(f"{name}_token_id")) is not None:
            config[key] = token
    ends = [fields.optional_integer(f"{name}_token_id") for name in ("eos", "eot")]
    tokens, kinds = fields.get("tokens"), fields.get("token_type")
    if isinstance(tokens, list) and isinstance(kinds, np.ndarray) and len(tokens) == len(kinds):
        control = np.flatnonzero(kinds == _GGUF_CONTROL_TOKEN).tolist()
        ends += [token for token in control if tokens[token] in _GGUF_END_TOKENS]
    config["eos_token_id"] = list(dict.fromkeys(token for token in ends if token is not None))
    sampling = Fields(metadata, prefix="general.sampling.")
    for name, key in _GGUF_SAMPLING_KEYS.items():
        if (value := sampling.optional_number(name)) is not None:
            config[key] = int(value) if key == "top_k" else value
    return config
