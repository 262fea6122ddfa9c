"""Reads the quantised matrices of GPTQ and AWQ checkpoints.

Both store, for a layer [out, in], unsigned codes, a scale and a zero point per output and group of
inputs: weight = scale * (code - zero). Integers are packed into int32 words, 32 / bits in each:

    GPTQ  qweight [in * bits / 32, out]: along the inputs, lowest bits first
          qzeros  [groups, out * bits / 32]: along the outputs, lowest bits first, minus one
          scales  [groups, out] float; g_idx [in] int32: the group of each input
    AWQ   qweight [in, out / 8]: along the outputs, in the order 0 2 4 6 1 3 5 7
          qzeros  [groups, out / 8]: likewise, as they are
          scales  [groups, out] float

Sources: AutoGPTQ, nn_modules/qlinear; AutoAWQ, modules/linear/gemm.py.

They become GGUF blocks of 32 inputs, which the engine packs like any other: Q4_0 where every zero
point is 8, else Q8_0, whose code is code - zero. Both are exact, because the scales are fp16 there
as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_native.config_fields import Fields
from qwen_native.errors import CheckpointError, quoted
from qwen_native.tensor_source import TensorSource

_Codes = npt.NDArray[np.uint8]
_PREFIX = "quantization_config."
_BLOCK = 32
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # output that each nibble of a word belongs to
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_FLOATS = {"F16": "<f2", "F32": "<f4"}


@dataclass(frozen=True, slots=True)
class GroupScheme:
    """How the matrices of a checkpoint are quantised.

    Attributes:
        method: "gptq" or "awq".
        bits: 4 or, GPTQ only, 8.
        group_size: inputs that share a scale, a multiple of 32; 0 = all of them.
        zero_offset: what to add to a stored zero point.
    """

    method: str
    bits: int
    group_size: int
    zero_offset: int


def group_scheme(config: Mapping[str, Any]) -> GroupScheme | None:
    """Read `quantization_config` of a config.json; None when there is none.

    Raises:
        CheckpointError: it asks for a method, a size or a layout that is not supported.
    """
    value = config.get("quantization_config")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise CheckpointError(f"quantization_config is {quoted(value)}, expected an object")
    fields = Fields({f"{_PREFIX}{name}": field for name, field in value.items()}, _PREFIX)
    method = fields.text("quant_method")
    if method not in ("gptq", "awq"):
        raise CheckpointError(
            f"{_PREFIX}quant_method is {quoted(method)}, which is not supported; "
            "expected gptq, awq, or a checkpoint that is not quantised"
        )
    bits = fields.integer("bits", "w_bit")
    if bits not in ((4, 8) if method == "gptq" else (4,)):
        expected = "4 or 8" if method == "gptq" else "4"
        raise CheckpointError(f"{_PREFIX}bits is {bits}, expected {expected} for {method}")
    size = fields.get("group_size", "q_group_size")
    if type(size) is not int or (size != -1 and (size < 1 or size % _BLOCK or size > 1 << 24)):
        raise CheckpointError(
            f"{_PREFIX}group_size is {quoted(size)}, expected a multiple of {_BLOCK}, or -1"
        )
    if method == "awq":
        fields.require({"version": ("gemm", "GEMM")})
        return GroupScheme(method, bits, max(size, 0), 0)
    fields.require({"checkpoint_format": ("gptq", "gptq_v2")})
    second = fields.text("checkpoint_format", default="gptq") == "gptq_v2"
    return GroupScheme(method, bits, max(size, 0), 0 if second else 1)


def dense_tensors(
    found: Mapping[str, TensorSource], scheme: GroupScheme
) -> dict[str, TensorSource]:
    """Replace the parts of every quantised matrix by a tensor `STEM.weight` of type Q4_0 or Q8_0.

    Biases of nothing but zeros, which AutoGPTQ writes for every matrix, are left out unless they
    belong to q, k or v.

    Raises:
        CheckpointError: a part is missing, mis-shaped or of another type; the inputs are not in
            order (`desc_act`), or a scale has no fp16 value.
    """
    stems = [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]
    parts = {f"{stem}.{part}" for stem in stems for part in _PARTS}
    dense = {name: tensor for name, tensor in found.items() if name not in parts}
    for stem in stems:
        if f"{stem}.weight" in found:
            raise CheckpointError(f"tensor {quoted(stem)} has both a weight and a qweight")
        dense[f"{stem}.weight"] = _dense(stem, found, scheme)
        bias = dense.get(f"{stem}.bias")
        if bias is not None and not _is_qkv(stem) and not bias.data.any():
            del dense[f"{stem}.bias"]
    return dense


def _is_qkv(stem: str) -> bool:
    return stem.endswith(("q_proj", "k_proj", "v_proj", "c_attn"))


def _dense(stem: str, found: Mapping[str, TensorSource], scheme: GroupScheme) -> TensorSource:
    per_word = 32 // scheme.bits
    words = _words(stem, "qweight", found)
    inputs, outputs = words.shape
    if scheme.method == "gptq":
        inputs *= per_word
    else:
        outputs *= per_word
    if inputs % _BLOCK or outputs % per_word or not inputs or not outputs:
        raise CheckpointError(
            f"tensor {quoted(stem)} has {inputs} inputs and {outputs} outputs, "
            f"expected multiples of {_BLOCK} and of {per_word}"
        )
    size = scheme.group_size or inputs
    groups = -(-inputs // size)
    _check_order(stem, found, inputs, size)
    zeros = _words(stem, "qzeros", found, (groups, outputs // per_word))
    scales = _scales(stem, found, (groups, outputs))
    if scheme.method == "gptq":
        codes = _unpack_rows(words, scheme.bits)
        zero_points = _unpack_rows(np.ascontiguousarray(zeros.T), scheme.bits).T
    else:
        codes, zero_points = _unpack_awq(words), _unpack_awq(zeros)
    # Modulo 2^bits: a zero point of 0, minus one, is stored as the greatest code.
    zero_points = (zero_points + np.uint8(scheme.zero_offset)) & np.uint8((1 << scheme.bits) - 1)
    block_group = np.arange(inputs // _BLOCK) * _BLOCK // size
    scale_bytes = np.ascontiguousarray(scales[block_group].T).view(np.uint8)
    blocks = codes.T.reshape(outputs, -1, _BLOCK)
    if scheme.bits == 4 and (zero_points == 8).all():
        dtype = "Q4_0"
        values = blocks[..., : _BLOCK // 2] | blocks[..., _BLOCK // 2 :] << 4
    else:
        dtype = "Q8_0"
        centred = blocks.astype(np.int16) - zero_points[block_group].T[..., None]
        if (centred < -128).any() or (centred > 127).any():
            raise CheckpointError(
                f"tensor {quoted(stem)} has codes {centred.min()} to {centred.max()} above their "
                "zero points, expected -128 to 127"
            )
        values = centred.astype(np.int8).view(np.uint8)
    data = np.concatenate([scale_bytes.reshape(outputs, -1, 2), values], axis=2).reshape(-1)
    data.flags.writeable = False
    return TensorSource(f"{stem}.weight", dtype, (outputs, inputs), data, None)


def _words(
    stem: str,
    part: str,
    found: Mapping[str, TensorSource],
    shape: tuple[int, int] | None = None,
) -> npt.NDArray[np.uint32]:
    source = _part(stem, part, found, ("I32", "U32"))
    if len(source.shape) != 2 or (shape is not None and source.shape != shape):
        raise CheckpointError(
            f"tensor {quoted(source.name)} has shape {source.shape}, "
            f"expected {shape or 'two dimensions'}"
        )
    return np.frombuffer(source.data, "<u4").reshape(source.shape)


def _part(
    stem: str, part: str, found: Mapping[str, TensorSource], types: tuple[str, ...]
) -> TensorSource:
    name = f"{stem}.{part}"
    source = found.get(name)
    if source is None:
        raise CheckpointError(f"tensor {quoted(name)} is missing, expected it beside qweight")
    if source.dtype not in types:
        raise CheckpointError(
            f"tensor {quoted(name)} has type {source.dtype}, expected {' or '.join(types)}"
        )
    return source


def _scales(
    stem: str, found: Mapping[str, TensorSource], shape: tuple[int, int]
) -> npt.NDArray[np.float16]:
    source = _part(stem, "scales", found, ("F16", "BF16", "F32"))
    if source.shape != shape:
        raise CheckpointError(
            f"tensor {quoted(source.name)} has shape {source.shape}, expected {shape}"
        )
    if source.dtype == "BF16":
        values = (np.frombuffer(source.data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(source.data, _FLOATS[source.dtype])
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all() or (halves != values).any():
        raise CheckpointError(
            f"tensor {quoted(source.name)} has a scale that fp16 does not hold exactly; "
            "expected finite fp16 scales"
        )
    return halves.reshape(shape)


def _check_order(
    stem: str, found: Mapping[str, TensorSource], inputs: int, group_size: int
) -> None:
    if f"{stem}.g_idx" not in found:
        return
    source = _part(stem, "g_idx", found, ("I32", "I64"))
    if source.shape != (inputs,):
        raise CheckpointError(
            f"tensor {quoted(source.name)} has shape {source.shape}, expected {(inputs,)}"
        )
    groups = np.frombuffer(source.data, "<i4" if source.dtype == "I32" else "<i8")
    if not np.array_equal(groups, np.arange(inputs) // group_size):
        raise CheckpointError(
            f"tensor {quoted(source.name)} does not count up in groups of {group_size}: the "
            "checkpoint was made with desc_act (activation order), which is not supported; "
            "expected one made with desc_act=False"
        )


def _unpack_rows(words: npt.NDArray[np.uint32], bits: int) -> _Codes:
    """[n, m] words to [n * 32 / bits, m] codes, lowest bits first."""
    layout = words.astype("<u4", copy=False)[:, :, None].view(np.uint8)  # [n, m, 4]
    if bits == 4:
        layout = np.stack([layout & 15, layout >> 4], axis=-1).reshape(*words.shape, 8)
    return np.ascontiguousarray(layout.transpose(0, 2, 1)).reshape(-1, words.shape[1])


def _unpack_awq(words: npt.NDArray[np.uint32]) -> _Codes:
    """[n, m] words to [n, 8 m] codes."""
    nibbles = words.astype("<u4", copy=False)[:, :, None].view(np.uint8)
    stored = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(*words.shape, 8)
    codes = np.empty_like(stored)
    codes[..., _AWQ_ORDER] = stored
    return codes.reshape(words.shape[0], -1)
