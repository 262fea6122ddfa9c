"""Calibrated 4-bit weights: `qwen-native quantize`.

The layers run one after the other on a calibration text, with the weights already rounded in front
of them. For each matrix the second moments H = X^T X of its inputs X are collected and its columns
are rounded in turn, the loudest first, each error compensated in the columns not rounded yet so
that the output X W^T changes least (GPTQ, arXiv 2210.17323). Scales and mins of the groups of 32
columns stay those that `ops.pack_weight` finds. Before that, loud inputs are made quieter where
this lowers the error: their factors move into the norm or the up_proj in front (AWQ, arXiv
2306.00978).

What the rounding costs is measured on text that it has not seen, against the source in float32, and
goes into the packed file as a receipt. When a KL budget is given and not met, the matrices whose
outputs suffer most per byte get 8 bits until it is.
"""

from __future__ import annotations

import functools
import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_native import _C, ops
from qwen_native.checkpoint import Checkpoint, open_checkpoint
from qwen_native.config import ModelConfig
from qwen_native.hub import resolve_model
from qwen_native.llm import LLM
from qwen_native.packed import PackedTensor, Progress, write
from qwen_native.packed_cache import load_tokenizer
from qwen_native.rope import rope_frequencies

Floats = npt.NDArray[np.float32]

WINDOW = 512
"""Tokens of one calibration or measurement window."""

_GROUP, _PANEL, _HEADER_BYTES, _BLOCK_BYTES = 32, 32, 384, 576  # csrc/kernels/quant_layout.h
_DAMPING = 0.01  # of the mean second moment, added to all of them
_SHRINKAGE = 0.3  # of the correlations between inputs; without it the text is learned by heart
_EXPONENTS = (0.25, 0.5)  # of the inputs' rms, tried as factors
_LARGEST_FACTOR = 16.0
_TRIAL_ROWS = 256
_BLOCK_COLUMNS = 64  # rounded before the rest of the row is compensated
_ROWS_AT_ONCE = 16384
_PAGE_TOKENS = 32
_SAMPLE_MODULES = ("statistics", "csv", "zipfile", "calendar", "fractions", "pprint")
_MEASURED_TOKENS = 2048
_HELD_OUT = 0.25  # of the text, at its end, for the measurement


def gptq_round(weight: Floats, moments: Floats) -> ops.PackedWeight:
    """Round a matrix to "int4" so that its outputs on the calibration inputs change least.

    Args:
        weight: [rows, cols].
        moments: [cols, cols], the sum of x x^T over the inputs x; symmetric.
    """
    packed = _as_packed(weight)
    diagonal = np.diagonal(moments)
    if not np.isfinite(diagonal).all() or not diagonal.any():
        return packed
    order = np.argsort(-diagonal, kind="stable")
    compensation = _compensation(moments[np.ix_(order, order)])
    grid = _Grid(packed)
    codes = np.empty(weight.shape, np.uint8)
    for begin in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = slice(begin, min(begin + _ROWS_AT_ONCE, weight.shape[0]))
        scales, mins = grid.columns(rows, order)
        rounded = _round_columns(weight[rows][:, order].T.copy(), scales, mins, compensation)
        codes[rows, order] = rounded.T
    return grid.with_codes(codes)


def _as_packed(weight: Floats) -> ops.PackedWeight:
    """Every weight to the nearest code."""
    data = np.ascontiguousarray(weight).reshape(-1).view(np.uint8)
    return ops.pack_weight(data, "F32", (weight.shape[0], weight.shape[1]), "int4")


def _round_columns(left: Floats, scales: Floats, mins: Floats, compensation: Floats) -> Any:
    """Codes [cols, rows] of the columns `left` [cols, rows], which is used up."""
    cols = left.shape[0]
    codes = np.empty(left.shape, np.uint8)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    for begin in range(0, cols, _BLOCK_COLUMNS):
        end = min(begin + _BLOCK_COLUMNS, cols)
        errors = np.empty((end - begin, left.shape[1]), np.float32)
        for j in range(begin, end):
            code = np.clip(np.rint((left[j] + mins[j]) * inverse[j]), 0, 15)
            codes[j] = code
            error = errors[j - begin]
            np.subtract(left[j], code * scales[j] - mins[j], out=error)
            error /= compensation[j, j]
            left[j + 1 : end] -= compensation[j, j + 1 : end, None] * error
        left[end:] -= compensation[begin:end, end:].T @ errors
    return codes


def _compensation(moments: Floats) -> Floats:
    """Upper triangular U with U^T U = (shrunk moments + damping)^-1.

    In float32: damping keeps the condition number below 100 cols.
    """
    diagonal = np.diagonal(moments)
    damped = moments * np.float32(1 - _SHRINKAGE)
    damped[np.diag_indices_from(damped)] = diagonal + _DAMPING * diagonal.mean()
    # H = R R^T with R upper triangular, from the Cholesky factor of H in reverse order; U = R^-1.
    inverse = _inverse_cholesky(np.ascontiguousarray(damped[::-1, ::-1]))
    return np.ascontiguousarray(inverse[::-1, ::-1])


def _inverse_cholesky(matrix: Floats) -> Floats:
    """L^-1 of matrix = L L^T; by halves, so that nearly all of it is matrix products."""
    n = len(matrix)
    if n <= 128:
        leaf = np.linalg.inv(np.linalg.cholesky(matrix.astype(np.float64)))
        return np.tril(leaf).astype(np.float32)
    half = n // 2
    out = np.zeros_like(matrix)
    first = _inverse_cholesky(matrix[:half, :half])
    below = matrix[half:, :half] @ first.T
    second = _inverse_cholesky(matrix[half:, half:] - below @ below.T)
    out[:half, :half], out[half:, half:] = first, second
    out[half:, :half] = -second @ (below @ first)
    return out


class _Grid:
    """The scales and mins of a packed "int4" matrix, and what it becomes with other codes."""

    def __init__(self, packed: ops.PackedWeight) -> None:
        self._rows, self._cols = packed.rows, packed.cols
        self._groups = -(-packed.cols // _GROUP)
        self._panels = -(-packed.rows // _PANEL)
        raw = packed.data.reshape(self._panels, _HEADER_BYTES + self._groups * _BLOCK_BYTES)
        self._header = raw[:, :_HEADER_BYTES].copy()
        self._blocks = raw[:, _HEADER_BYTES:].reshape(self._panels, self._groups, -1).copy()
        factors = self._header.view(np.float32).reshape(self._panels, 1, 3, _PANEL)
        self._scales = self._by_row(factors[:, :, 0] * self._blocks[..., :32])
        self._mins = self._by_row(factors[:, :, 1] * self._blocks[..., 32:64])

    def _by_row(self, values: Floats) -> Floats:
        """[panels, groups, 32] to [rows, groups]."""
        return values.transpose(0, 2, 1).reshape(-1, self._groups)[: self._rows]

    def with_rows_divided(self, factors: Floats) -> ops.PackedWeight:
        """The matrix with each row divided by its factor; the codes stay."""
        divisor = np.ones(self._panels * _PANEL, np.float32)
        divisor[: self._rows] = factors
        header = self._header.view(np.float32).reshape(self._panels, 3, _PANEL)
        header /= divisor.reshape(self._panels, 1, _PANEL)
        return self._joined()

    def _joined(self) -> ops.PackedWeight:
        data = np.concatenate([self._header, self._blocks.reshape(self._panels, -1)], axis=1)
        return ops.PackedWeight(data.reshape(-1), "int4", self._rows, self._cols)

    def columns(self, rows: slice, order: npt.NDArray[np.intp]) -> tuple[Floats, Floats]:
        """Scales and mins [cols, rows] of the columns in this order."""
        groups = order // _GROUP
        return self._scales[rows].T[groups], self._mins[rows].T[groups]

    def with_codes(self, codes: npt.NDArray[np.uint8]) -> ops.PackedWeight:
        """The matrix with codes [rows, cols]."""
        padded = np.zeros((self._panels * _PANEL, self._groups * _GROUP), np.uint8)
        padded[: self._rows, : self._cols] = codes
        largest = np.zeros(self._panels * _PANEL, np.float32)
        for group in range(self._groups):
            inside = codes[:, group * _GROUP : (group + 1) * _GROUP]
            values = inside * self._scales[:, group, None] - self._mins[:, group, None]
            np.maximum(largest[: self._rows], np.abs(values).max(axis=1), out=largest[: self._rows])
        factors = self._header.view(np.float32).reshape(self._panels, 3, _PANEL)
        factors[:, 2] = (largest / np.float32(127)).reshape(self._panels, _PANEL)
        nibbles = padded.reshape(self._panels, 2, 16, self._groups, 4, 2, 4)
        # [panel, half, row, group, dword, low or high, byte] to
        # [panel, group, half, dword, row, byte]
        low, high = (nibbles[..., i, :].transpose(0, 3, 1, 4, 2, 5) for i in (0, 1))
        self._blocks[..., 64:] = (low | high << 4).reshape(self._panels, self._groups, 512)
        return self._joined()


@dataclass
class _Matrix:
    """One rounded matrix.

    Attributes:
        packed: what runs.
        error: relative error of its outputs on the calibration text, ||X dW|| / ||X W||; of the
            embedding, whose outputs are its rows, ||dW|| / ||W||.
        columns: [cols], what the source's columns were multiplied by.
        rows: [rows], what its rows were divided by.
    """

    packed: ops.PackedWeight
    error: float
    columns: Floats | None = None
    rows: Floats | None = None

    def of_source(self, weight: Floats) -> Floats:
        """The unrounded matrix that `packed` stands for."""
        if self.columns is not None:
            weight = weight * self.columns
        return weight if self.rows is None else weight / self.rows[:, None]


class _Calibrator:
    """Runs the layers on windows of token ids and rounds every matrix on the way."""

    def __init__(self, checkpoint: Checkpoint, windows: npt.NDArray[np.int32]) -> None:
        self._checkpoint, self._config = checkpoint, checkpoint.config
        self._count, self._length = windows.shape
        self.matrices: dict[str, _Matrix] = {}
        self.norms: dict[str, Floats] = {}  # those that took factors
        ids = np.ascontiguousarray(windows.reshape(-1))
        self._x = self._embedded(ids)
        cos, sin = _rope_table(self._config, self._length)
        self._cos, self._sin = np.tile(cos, (self._count, 1)), np.tile(sin, (self._count, 1))

    def _embedded(self, ids: npt.NDArray[np.int32]) -> Floats:
        """Rows of the embedding, which is rounded without calibration: its inputs are one-hot."""
        name = "model.embed_tokens.weight"
        table = self._rounded(name, np.zeros((0, 0), np.float32))
        if "lm_head.weight" in self._checkpoint.tensors:
            self.matrices[name] = table
        rows: Floats = ops.gather(ids, table.packed)
        return rows

    def _dense(self, name: str) -> Floats:
        source = self._checkpoint.tensors[name]
        shape = source.shape if len(source.shape) == 2 else (1, source.shape[0])
        values = ops.decode_source(source.data, source.dtype, (shape[0], shape[1]))
        self._checkpoint.release(source)
        return values.reshape(source.shape)

    def _vector(self, name: str) -> Floats | None:
        return self._dense(name) if name in self._checkpoint.tensors else None

    def _linear(
        self,
        stem: str,
        parts: Sequence[str],
        x: Floats,
        divide_source: Callable[[Floats], None] | None = None,
    ) -> Floats:
        """Round the matrices that take x, then run them.

        `divide_source`, if given, makes what gives x give x / factors from now on.
        """
        moments = _second_moments(x)
        names = [f"{stem}{part}" for part in parts]
        factors = None
        if divide_source is not None:
            factors = self._factors([f"{name}.weight" for name in names], moments)
        if factors is not None and divide_source is not None:
            divide_source(factors)
            x = x / factors
            moments /= np.outer(factors, factors)
        for name in names:
            self.matrices[f"{name}.weight"] = self._rounded(f"{name}.weight", moments, factors)
        packed = [self.matrices[f"{name}.weight"].packed for name in names]
        biases = [self._vector(f"{name}.bias") for name in names]
        result: Floats = ops.linear(x, packed, biases, invariant=True)
        return result

    def _is_rounded(self, name: str) -> bool:
        return _C.chosen_format("int4", self._checkpoint.tensors[name].dtype) == "int4"

    def _factors(self, names: Sequence[str], moments: Floats) -> Floats | None:
        """[cols], what to multiply columns by so that rounding costs least; None for nothing."""
        if not all(self._is_rounded(name) for name in names):
            return None
        weight = np.concatenate([self._dense(name) for name in names])
        weight = weight[:: -(-len(weight) // _TRIAL_ROWS)]
        rms = np.sqrt(np.diagonal(moments))
        if not np.isfinite(rms).all() or not rms.any():
            return None
        rms = np.maximum(rms, rms.max() * 1e-6)
        best = None
        least = _output_power(ops.unpack_weight(_as_packed(weight)) - weight, moments)
        for exponent in _EXPONENTS:
            factors = rms**exponent
            factors /= np.exp(np.mean(np.log(factors)))
            factors = np.clip(factors, 1 / _LARGEST_FACTOR, _LARGEST_FACTOR).astype(np.float32)
            trial = ops.unpack_weight(_as_packed(weight * factors)) / factors
            power = _output_power(trial - weight, moments)
            if power < least:
                best, least = factors, power
        return best

    def _rounded(self, name: str, moments: Floats, factors: Floats | None = None) -> _Matrix:
        source = self._checkpoint.tensors[name]
        weight = self._dense(name)
        if factors is not None:
            weight *= factors
        if self._is_rounded(name):
            packed = gptq_round(weight, moments) if len(moments) else _as_packed(weight)
        else:  # the source has 4 bits itself and is held exactly
            packed = ops.pack_weight(source.data, source.dtype, weight.shape, "int4_symmetric")
        difference = ops.unpack_weight(packed) - weight
        power = _output_power(weight, moments)
        error = math.sqrt(_output_power(difference, moments) / power) if power > 0 else 0.0
        return _Matrix(packed, error, factors)

    def _divide_norm(self, name: str, factors: Floats) -> None:
        self.norms[name] = self._dense(name) / factors

    def _divide_up(self, name: str, factors: Floats) -> None:
        up = self.matrices[name]
        up.packed, up.rows = _Grid(up.packed).with_rows_divided(factors), factors

    def run(self, progress: Progress | None) -> None:
        """Round all layers and the head."""
        config = self._config
        eps = config.rms_norm_eps
        x = self._x
        for i in range(config.num_layers):
            if progress is not None:
                progress("calibrating layers", i, config.num_layers + 1)
            stem = f"model.layers.{i}."
            h = ops.rms_norm(x, self._dense(f"{stem}input_layernorm.weight"), eps)
            attended = self._attention(i, h)
            x += self._linear(f"{stem}self_attn.", ["o_proj"], attended)
            h = ops.rms_norm(x, self._dense(f"{stem}post_attention_layernorm.weight"), eps)
            divide = functools.partial(self._divide_norm, f"{stem}post_attention_layernorm.weight")
            both = self._linear(f"{stem}mlp.", ["gate_proj", "up_proj"], h, divide)
            gate, up = np.split(both, 2, axis=1)
            inner = ops.swiglu(np.ascontiguousarray(gate), np.ascontiguousarray(up))
            divide = functools.partial(self._divide_up, f"{stem}mlp.up_proj.weight")
            scalable = self._is_rounded(f"{stem}mlp.up_proj.weight")
            x += self._linear(f"{stem}mlp.", ["down_proj"], inner, divide if scalable else None)
        head = "lm_head" if "lm_head.weight" in self._checkpoint.tensors else "model.embed_tokens"
        h = ops.rms_norm(x, self._dense("model.norm.weight"), eps)
        self.matrices[f"{head}.weight"] = self._rounded(f"{head}.weight", _second_moments(h))
        if progress is not None:
            progress("calibrating layers", config.num_layers + 1, config.num_layers + 1)

    def _attention(self, layer: int, h: Floats) -> Floats:
        config, tokens = self._config, len(h)
        stem = f"model.layers.{layer}.self_attn."
        divide = functools.partial(
            self._divide_norm, f"model.layers.{layer}.input_layernorm.weight"
        )
        qkv = self._linear(stem, ["q_proj", "k_proj", "v_proj"], h, divide)
        heads = qkv.reshape(tokens, -1, config.head_dim)
        first, second = config.num_heads, config.num_heads + config.num_kv_heads
        q, k, v = (np.ascontiguousarray(part) for part in np.split(heads, [first, second], axis=1))
        if config.qk_norm:
            q = self._normed_heads(q, f"{stem}q_norm.weight")
            k = self._normed_heads(k, f"{stem}k_norm.weight")
        ops.rope(q, self._cos, self._sin)
        ops.rope(k, self._cos, self._sin)
        per_window = -(-self._length // _PAGE_TOKENS)
        page_bytes = ops.kv_page_bytes(_PAGE_TOKENS, config.num_kv_heads, config.head_dim, "f32")
        pool = np.zeros((per_window * self._count, page_bytes // 4), np.int32)
        pages = ops.KvPages(pool, _PAGE_TOKENS, config.num_kv_heads, config.head_dim, "f32")
        spans = [
            ops.SequenceSpan(
                w * self._length,
                self._length,
                self._length,
                list(range(w * per_window, (w + 1) * per_window)),
            )
            for w in range(self._count)
        ]
        ops.kv_append(pages, k, v, spans)
        windowed = config.sliding_window is not None and layer >= config.max_window_layers
        window = config.sliding_window if windowed and config.sliding_window else 0
        out: Floats = ops.attention(q, pages, spans, window=window).reshape(tokens, -1)
        return out

    def _normed_heads(self, x: Floats, name: str) -> Floats:
        flat = x.reshape(-1, x.shape[-1])
        out: Floats = ops.rms_norm(flat, self._dense(name), self._config.rms_norm_eps)
        return out.reshape(x.shape)


def _second_moments(x: Floats) -> Floats:
    """X^T X from products of bf16, whose error is far below that of a sample of tokens."""
    channels = np.ascontiguousarray(x.T)
    half = _in_bf16(channels)
    product = ops.linear(channels, half)
    result: Floats = (product + product.T) / 2
    return result


def _in_bf16(matrix: Floats) -> ops.PackedWeight:
    data = np.ascontiguousarray(matrix).reshape(-1).view(np.uint8)
    return ops.pack_weight(data, "F32", (matrix.shape[0], matrix.shape[1]), "bf16")


def _output_power(weight: Floats, moments: Floats) -> float:
    """The sum of squares of all outputs: tr(W H W^T); of the weights where H is empty."""
    if not len(moments):
        return float(np.vdot(weight, weight))
    half = _in_bf16(moments)  # symmetric
    total = 0.0
    for begin in range(0, len(weight), _ROWS_AT_ONCE):
        rows = np.ascontiguousarray(weight[begin : begin + _ROWS_AT_ONCE])
        total += float(np.vdot(ops.linear(rows, half), rows))
    return max(total, 0.0)


def _rope_table(config: ModelConfig, length: int) -> tuple[Floats, Floats]:
    """cos and sin [length, rope_dim / 2], as in csrc/model/rope_table.cpp.

    Windows are no longer than Qwen-1's seq_length, where dynamic NTK and LogN do nothing.
    """
    angles = np.outer(np.arange(length, dtype=np.float32), rope_frequencies(config))
    factor = np.float32(config.yarn.attention_factor if config.yarn is not None else 1.0)
    return np.cos(angles) * factor, np.sin(angles) * factor


@dataclass(frozen=True)
class Divergence:
    """How one model differs from another on a text.

    Attributes:
        kl: mean KL divergence of the next-token distributions, in nats.
        flips: share of positions whose most probable token differs.
        perplexity: of the model itself on these positions.
        positions: how many were compared.
    """

    kl: float
    flips: float
    perplexity: float
    positions: int


class Reference:
    """Log-probabilities of the source model on the second halves of windows, kept on disk."""

    def __init__(
        self, model: LLM, windows: npt.NDArray[np.int32], progress: Progress | None
    ) -> None:
        self._windows, self._half = windows, windows.shape[1] // 2
        vocab = model.config.vocab_size
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the object)
        count = len(windows)
        shape = (count, windows.shape[1] - self._half, vocab)
        self._logs: Any = np.memmap(self._file, np.float16, "w+", shape=shape)
        for i, window in enumerate(windows):
            if progress is not None:
                progress("measuring the source", i, count)
            self._logs[i] = self._log_probabilities(model, window)
        self.perplexity = self.compare(model=None, progress=None).perplexity

    def _log_probabilities(self, model: LLM, window: npt.NDArray[np.int32]) -> Floats:
        logits = model.logits(window.tolist(), last=len(window) - self._half)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, dtype=np.float64))[:, None].astype(np.float32)
        return logits

    def compare(self, model: LLM | None, progress: Progress | None) -> Divergence:
        """Compare a model with the reference; None compares the reference with itself."""
        divergence = negative = 0.0
        flips = scored = positions = 0
        for i, window in enumerate(self._windows):
            truth = self._logs[i].astype(np.float32)
            other = truth if model is None else self._log_probabilities(model, window)
            probability = np.exp(truth)
            divergence += float(np.sum(probability * (truth - other), dtype=np.float64))
            flips += int((truth.argmax(axis=1) != other.argmax(axis=1)).sum())
            positions += len(truth)
            following = window[self._half + 1 :]
            negative -= float(other[np.arange(len(following)), following].sum(dtype=np.float64))
            scored += len(following)
            if progress is not None:
                progress("measuring the result", i + 1, len(self._windows))
        return Divergence(
            divergence / positions, flips / positions, math.exp(negative / scored), positions
        )


@dataclass(frozen=True)
class Sample:
    """The text of a calibration.

    Attributes:
        name: what it is, for the receipt.
        calibration, held_out: for rounding and for measuring; text, or token ids.
    """

    name: str
    calibration: str | Sequence[int]
    held_out: str | Sequence[int]

    @classmethod
    def of_ids(cls, ids: Sequence[int]) -> Sample:
        """Token ids, for a model without a tokenizer; the last quarter is held out."""
        cut = int(len(ids) * (1 - _HELD_OUT))
        digest = hashlib.sha256(np.array(ids, np.int64).tobytes()).hexdigest()[:16]
        return cls(f"{len(ids)} token ids, sha256 {digest}", ids[:cut], ids[cut:])

    @classmethod
    def of_file(cls, path: Path) -> Sample:
        """The user's text; its last quarter is held out."""
        data = path.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} has byte {data[error.start]:#04x} at {error.start}, expected UTF-8"
            ) from None
        cut = int(len(text) * (1 - _HELD_OUT))
        digest = hashlib.sha256(data).hexdigest()[:16]
        return cls(f"{path.name}, sha256 {digest}", text[:cut], text[cut:])

    @classmethod
    def default(cls) -> Sample:
        """Python's own library: source code, and its language reference as prose."""
        import importlib.util
        import platform
        from pydoc_data.topics import topics

        sources = []
        for name in _SAMPLE_MODULES:
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.origin is not None:
                sources.append(Path(spec.origin).read_text(encoding="utf-8"))
        prose = [topics[key] for key in sorted(topics)]
        mixed = [_interleaved(sources[:-2], prose[::2]), _interleaved(sources[-2:], prose[1::2])]
        return cls(f"the library of Python {platform.python_version()}", *mixed)


def _interleaved(sources: Sequence[str], prose: Sequence[str], piece: int = 4000) -> str:
    """Pieces of both texts in turn."""
    texts = ["\n".join(sources), "\n".join(prose)]
    count = min(map(len, texts)) // piece
    return "".join(text[i * piece : (i + 1) * piece] for i in range(count) for text in texts)


def quantize(
    model: str | Path | None,
    out: str | Path,
    *,
    text: str | Path | Sequence[int] | None = None,
    tokens: int = 16384,
    kl_budget: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a packed file with calibrated 4-bit weights.

    Args:
        model: As in `LLM`; not a .qn file.
        out: The .qn file to write.
        text: File with UTF-8 text like what the model will see, or token ids; default: Python's
            own library. The last quarter is held out for the measurement.
        tokens: Most tokens of it to calibrate on; up to 2048 others measure the result.
        kl_budget: Highest mean KL divergence from the source, in nats. While it is exceeded,
            matrices get 8 bits.
        threads: Default: the CPUs this process may use.
        progress: Called with (what, done, total).

    Returns:
        The receipt, which is also in the file.

    Raises:
        ValueError: An option or the checkpoint is not usable, the text is too short, or the budget
            cannot be met.
        OSError: A file cannot be read or written.
    """
    out = Path(out)
    if out.suffix != ".qn":
        raise ValueError(f"the output is {str(out)!r}, expected a name that ends in .qn")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is not a folder, expected one for the output")
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}, expected at least 1")
    if kl_budget is not None and not kl_budget > 0:
        raise ValueError(f"kl_budget is {kl_budget}, expected more than 0")
    path = resolve_model(model, progress)
    if path.suffix == ".qn":
        raise ValueError(f"{path} is packed already, expected what it was made from")
    if text is None:
        sample = Sample.default()
    elif isinstance(text, (str, Path)):
        sample = Sample.of_file(Path(text))
    else:
        sample = Sample.of_ids(text)
    source = LLM(path, weights="f32", threads=threads, packed_cache=False, progress=progress)
    length = min(WINDOW, source.context)
    calibration = _windows(source, sample.calibration, length, tokens)
    held_out = _windows(source, sample.held_out, length, _MEASURED_TOKENS)
    reference = Reference(source, held_out, progress)
    threads = source.threads
    del source
    checkpoint = open_checkpoint(path)
    before = _C.op_threads()
    _C.set_op_threads(threads)
    try:
        calibrator = _Calibrator(checkpoint, calibration)
        calibrator.run(progress)
    finally:
        _C.set_op_threads(before)
    packer = _Packer(checkpoint, calibrator.matrices, calibrator.norms)
    facts = {
        "method": "AWQ factors in norms and up_proj; GPTQ, groups of 32, activation order",
        "source": path.name,
        "text": sample.name,
        "calibration_tokens": int(calibration.size),
        "source_perplexity": round(reference.perplexity, 4),
    }

    def attempt(wide: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".quantize-") as folder:
            trial = Path(folder) / "trial.qn"
            packer.write(trial, wide, facts, progress)
            candidate = LLM(trial, threads=threads)
            result = reference.compare(candidate, progress)
            bits = 8 * candidate.model.weight_bytes / packer.weight_count
            del candidate
        return facts | {
            "mean_kl": round(result.kl, 6),
            "top1_flips": round(result.flips, 5),
            "perplexity": round(result.perplexity, 4),
            "measured_positions": result.positions,
            "bits_per_weight": round(bits, 4),
            "matrices_at_8_bits": packer.wide_names(wide),
            "output_error": {
                name: round(matrix.error, 5) for name, matrix in calibrator.matrices.items()
            },
        }

    wide, receipt = 0, attempt(0)
    if kl_budget is not None and receipt["mean_kl"] > kl_budget:
        wide, receipt = _fewest(attempt, packer.most_wide, kl_budget)
    packer.write(out, wide, receipt, progress)
    return receipt


def _fewest(
    attempt: Callable[[int], dict[str, Any]], most: int, budget: float
) -> tuple[int, dict[str, Any]]:
    """The smallest number of wide matrices, by bisection, that keeps the budget."""
    low, high = 0, most
    best = attempt(most)
    if best["mean_kl"] > budget:
        raise ValueError(
            f"the KL divergence is {best['mean_kl']} with all matrices at 8 bits, "
            f"expected at most kl_budget = {budget}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        receipt = attempt(middle)
        if receipt["mean_kl"] <= budget:
            high, best = middle, receipt
        else:
            low = middle
    return high, best


class _Packer:
    """Writes the packed file with some matrices at 8 bits."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        matrices: Mapping[str, _Matrix],
        norms: Mapping[str, Floats],
    ) -> None:
        self._checkpoint, self._matrices, self._norms = checkpoint, matrices, norms
        # Those of one layer that take the same input go together, by error per byte.
        units: dict[str, list[str]] = {}
        for name in matrices:
            if matrices[name].packed.format == "int4":
                units.setdefault(_unit(name), []).append(name)
        gain = {
            unit: max(matrices[n].error ** 2 for n in names)
            / sum(matrices[n].packed.nbytes for n in names)
            for unit, names in units.items()
        }
        self._ranked = [units[unit] for unit in sorted(gain, key=gain.__getitem__, reverse=True)]
        self.most_wide = len(self._ranked)
        self.weight_count = sum(
            math.prod(t.shape) for t in checkpoint.tensors.values() if len(t.shape) == 2
        )

    def wide_names(self, wide: int) -> list[str]:
        """The matrices that get 8 bits."""
        return [name for names in self._ranked[:wide] for name in names]

    def write(
        self, path: Path, wide: int, receipt: Mapping[str, Any], progress: Progress | None
    ) -> None:
        """Write the file; `wide` units, the worst first, get 8 bits."""
        wide_names = set(self.wide_names(wide))
        tokenizer = load_tokenizer(self._checkpoint)
        write(
            path,
            config=self._checkpoint.config,
            generation_config=self._checkpoint.generation_config,
            chat_template=self._checkpoint.chat_template,
            tokenizer=None if tokenizer is None else tokenizer.compact(),
            tensors=list(self._tensors(wide_names)),
            weights="mixed" if wide_names else "int4",
            receipt=receipt,
            progress=progress,
        )

    def _tensors(self, wide: set[str]) -> Iterator[PackedTensor]:
        for name, source in self._checkpoint.tensors.items():
            matrix = self._matrices.get(name)
            if matrix is not None and name not in wide:
                yield PackedTensor.of(name, matrix.packed)
            elif name in self._norms:
                yield PackedTensor.of(name, self._norms[name])
            else:
                shape = source.shape if len(source.shape) == 2 else (1, source.shape[0])
                values = ops.decode_source(source.data, source.dtype, (shape[0], shape[1]))
                if matrix is None:
                    yield PackedTensor.of(name, values.reshape(source.shape))
                else:
                    data = matrix.of_source(values).reshape(-1).view(np.uint8)
                    packed = ops.pack_weight(data, "F32", (shape[0], shape[1]), "int8")
                    yield PackedTensor.of(name, packed)


def _unit(name: str) -> str:
    for part in ("q_proj", "k_proj", "v_proj"):
        name = name.replace(part, "qkv")
    return name.replace("gate_proj", "gate_up").replace("up_proj", "gate_up")


def _windows(
    model: LLM, text: str | Sequence[int], length: int, tokens: int
) -> npt.NDArray[np.int32]:
    """[count, length] token ids, spread over the text."""
    if isinstance(text, str):
        if model.tokenizer is None:
            raise ValueError(f"{model.path}: has no tokenizer files, expected them for a text")
        ids: Sequence[int] = model.tokenizer.encode(text)
    else:
        ids = text
        vocab = model.config.vocab_size
        unknown = next((i for i in ids if not 0 <= i < vocab), None)
        if unknown is not None:
            raise ValueError(f"token id {unknown} is not in the vocabulary of {vocab}")
    available = len(ids) // length
    if available == 0:
        raise ValueError(f"a part of the text has {len(ids)} tokens, expected at least {length}")
    count = min(max(tokens // length, 1), available)
    chosen = [i * available // count for i in range(count)]
    return np.array([ids[i * length : (i + 1) * length] for i in chosen], np.int32)
