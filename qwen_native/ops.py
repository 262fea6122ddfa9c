"""The engine's ops on numpy arrays or torch tensors.

Every function takes numpy float32 arrays or torch tensors (float32 or bfloat16; moved across by
DLPack, without a copy) and returns an array of the same kind. They run on the active
instruction-set level (`set_isa`).

Most of them also take torch tensors, or other arrays with DLPack, on the first GPU, in a build with
CUDA kernels: `rms_norm`, `rope`, `swiglu`, `softmax_xent`, `packed_attention`, their gradients,
`adamw`, `linear`, `mlp`, `gather` and `matmul`; `linear_w8a8` and `linear_xent` take nothing else.
The work is queued on torch's current stream (of other arrays: the one that
`__cuda_array_interface__` names). There

- activations are bfloat16, results and biases of `linear`, `mlp` and `gather` too,
- a weight is a bfloat16 matrix or a `GpuWeight`,
- matrices that are multiplied have rows of a multiple of 8 elements, 16 bytes or a multiple of them
  apart, and begin at a multiple of 16 bytes,
- `packed_attention` has head_dim 64, 80, 96 or 128,
- nobody looks at the values of ids, `targets` and `cu_seqlens` beforehand: an id or a target
  outside the vocabulary gives NaN, documents are cut to the tokens that there are.

The others, of the paged cache (`attention`, `kv_append`), single numbers (`argmax`, `log_sum_exp`,
`squared_norm`) and of checkpoints, refuse arrays on a GPU with a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qwen_native import _C
from qwen_native._C import GpuWeight as GpuWeight
from qwen_native._C import PackedWeight as PackedWeight


def set_isa(name: str) -> None:
    """Switch the process to a level: "scalar", "avx2", "avx512", "avx512_bf16" or
    "amx".

    Raises:
        ValueError: the name is not a level, or the host or the build does not have it.
    """
    _C.set_isa(name)


def available_isas() -> list[str]:
    """Levels that are built and that this host can run, lowest first."""
    order = ["scalar", "avx2", "avx512", "avx512_bf16", "amx"]
    built = _C.built_isas()
    return [name for name in order[: order.index(_C.host_isa()) + 1] if name in built]


def _empty(like: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype=like.dtype)
    return like.new_empty(shape)


def _empty_f32(like: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(like, np.ndarray):
        return np.empty(shape, np.float32)
    return like.new_empty((0,)).float().new_empty(shape)  # nothing is converted


def _on_gpu(x: Any) -> bool:
    cuda = 2  # of DLPack
    return hasattr(x, "__dlpack_device__") and int(x.__dlpack_device__()[0]) == cuda


def _detach(x: Any) -> Any:
    return x.detach() if hasattr(x, "detach") else x


def rms_norm(x: Any, weight: Any, eps: float = 1e-6, residual: Any | None = None) -> Any:
    """Return `x / sqrt(mean(x**2, -1) + eps) * weight`.

    Args:
        x: [rows, cols], f32 | bf16, last axis dense.
        weight: [cols], f32 | bf16.
        eps: added to the mean square.
        residual: [rows, cols], dtype of x. When given it is updated in place, `residual += x`,
            and the norm is taken of the sum.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    x, weight = _detach(x), _detach(weight)
    out = _empty(x, tuple(x.shape))
    _C.rms_norm(out, x, weight, eps, None if residual is None else _detach(residual))
    return out


def linear(
    x: Any,
    weight: Any | Sequence[Any],
    bias: Any | None = None,
    *,
    out: Any | None = None,
    add: bool = False,
    invariant: bool = False,
) -> Any:
    """Return `x @ weight.T + bias`, for several weights side by side in one call.

    At the levels "avx512_bf16" and "amx", bf16 weights multiply x rounded to bf16; all other levels
    and f32 weights multiply in float32. Quantised weights multiply x rounded to int8 in groups of
    32 columns, those of "int8" in blocks of at most 512. Sums are float32 everywhere. A row of the
    result does not depend on the other rows of x or on the number of threads, bit for bit. The
    exception are 4-bit weights above "scalar" without `invariant`: eight rows of x or more (32 on
    AMD's processors with AVX-512) take a faster kernel (docs/NUMERICS.md), which rounds x to int8
    in blocks of 1024 columns and, from "avx512" on, the weights to int8 with one scale per row.

    Args:
        x: [tokens, cols], f32, last axis dense.
        weight: [rows, cols], f32 | bf16, last axis dense, or a PackedWeight or GpuWeight, or a
            sequence of such weights, whose results are concatenated along the last axis.
        bias: [rows], f32, or None; for a sequence of weights a sequence of these.
        out: [tokens, sum of rows], f32, last axis dense; a new array by default. On a GPU f32 or
            bf16, and the columns of every weight begin at a multiple of 16 bytes.
        add: add to `out`, which must then be given, instead of overwriting it.
        invariant: for 4-bit weights, keep the bits of a row independent of the number of rows.

    Returns:
        out.

    Raises:
        ValueError: a shape or dtype does not fit, or `add` without `out`.
    """
    several = isinstance(weight, (list, tuple))
    weights = [_detach(w) for w in (weight if several else [weight])]
    biases = [None] * len(weights) if bias is None else list(bias) if several else [bias]
    if len(biases) != len(weights):
        raise ValueError(
            f"[linear] bias has {len(biases)} entries, expected {len(weights)} as weight has"
        )
    segments, rows = [], 0
    for w, b in zip(weights, biases, strict=True):
        segments.append(_C.LinearSegment(w, None if b is None else _detach(b), rows))
        rows += int(w.shape[0])
    if out is None:
        if add:
            raise ValueError("[linear] out is missing, expected an array to add to")
        out = _empty(x, (int(x.shape[0]), rows))
    _C.linear(_detach(out), _detach(x), segments, add, invariant)
    return out


def linear_w8a8(
    x: Any, codes: Any, scales: Any, bias: Any | None = None, out: Any | None = None
) -> Any:
    """Return `x @ (codes * scales[:, None]).T + bias` with x rounded to int8, on a GPU only.

    Every token of x takes the scale of its largest element, as in LLM.int8() (arXiv 2208.07339); a
    product of codes is summed exactly.

    Args:
        x: [tokens, cols], bf16, cols a multiple of 16.
        codes: [rows, cols], int8.
        scales: [rows], f32.
        bias: [rows], bf16, or None.
        out: [tokens, rows], bf16 | f32, last axis dense; a new bf16 array by default.

    Returns:
        out.

    Raises:
        ValueError: a shape or dtype does not fit, or the arrays are not on a GPU.
    """
    x = _detach(x)
    if out is None:
        out = _empty(x, (int(x.shape[0]), int(codes.shape[0])))
    _C.linear_w8a8(
        _detach(out), x, _detach(codes), _detach(scales), None if bias is None else _detach(bias)
    )
    return out


def rope(x: Any, cos: Any, sin: Any) -> Any:
    """Rotate x in place: pairs (a, b) = (x[i], x[i + half]) become (a cos - b sin, b cos + a sin).

    Elements from `2 * half` on stay as they are.

    Args:
        x: [tokens, heads, head_dim], f32 | bf16, last axis dense.
        cos, sin: [tokens, half], f32, half <= head_dim / 2.

    Returns:
        x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _C.rope(_detach(x), _detach(cos), _detach(sin))
    return x


def swiglu(gate: Any, up: Any, out: Any | None = None) -> Any:
    """Return `gate * sigmoid(gate) * up`.

    Args:
        gate, up: [tokens, inter], f32 | bf16, last axis dense.
        out: array of the same shape and dtype, which may be gate or up; a new one by default.

    Returns:
        out. -inf in gate gives NaN, as in torch.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    gate, up = _detach(gate), _detach(up)
    result = _empty(gate, tuple(gate.shape)) if out is None else out
    _C.swiglu(_detach(result), gate, up)
    return result


def rms_norm_bwd(
    dy: Any, x: Any, weight: Any, eps: float = 1e-6, residual_grad: Any | None = None
) -> tuple[Any, Any]:
    """Return the gradients (dx, dweight) of `rms_norm`.

    The sum over the rows is taken in an order that depends on their number alone.

    Args:
        dy: [rows, cols], gradient of the norm's result, f32 | bf16, last axis dense.
        x: like dy; after a norm with a residual the sum.
        weight: [cols], f32 | bf16.
        eps: added to the mean square.
        residual_grad: like x, another gradient of x, which is added to dx; or None.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    dy, x, weight = _detach(dy), _detach(x), _detach(weight)
    dx, dweight = _empty(x, tuple(x.shape)), _empty(weight, tuple(weight.shape))
    other = None if residual_grad is None else _detach(residual_grad)
    _C.rms_norm_bwd(dx, dweight, dy, x, weight, eps, other)
    return dx, dweight


def swiglu_bwd(dout: Any, gate: Any, up: Any) -> tuple[Any, Any]:
    """Return the gradients (dgate, dup) of `swiglu`.

    Args:
        dout: [tokens, inter], gradient of the result, f32 | bf16, last axis dense.
        gate, up: like dout.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    dout, gate, up = _detach(dout), _detach(gate), _detach(up)
    dgate, dup = _empty(gate, tuple(gate.shape)), _empty(up, tuple(up.shape))
    _C.swiglu_bwd(dgate, dup, dout, gate, up)
    return dgate, dup


def softmax_xent(logits: Any, targets: Any, scale: float = 1.0, grad: Any | None = None) -> Any:
    """Return `log(softmax(scale * logits))` at each row's target.

    With `grad` the logits are replaced by their gradient,
    `grad * scale * (one_hot(target) - softmax(scale * logits))`.

    Args:
        logits: [rows, vocab], f32 | bf16, last axis dense; overwritten when there is a grad.
        targets: [rows], int32 in [0, vocab), or -1: the result is 0 and the gradient zeros.
        scale: factor of the logits, positive: 1 / temperature.
        grad: [rows], f32, gradient of the result, or None.

    Returns:
        [rows], f32.

    Raises:
        ValueError: a target is not in the vocabulary, or a shape or dtype does not fit.
    """
    logits = _detach(logits)
    rows = int(logits.shape[0])
    log_prob = _empty_f32(logits, (rows,))
    _C.softmax_xent(
        log_prob, logits, _detach(targets), scale, None if grad is None else _detach(grad)
    )
    return log_prob


def packed_attention(
    q: Any, k: Any, v: Any, cu_seqlens: Any, scale: float, window: int = 0
) -> tuple[Any, Any]:
    """Return causal softmax(scale * q k^T) v within each document, and its log-sum-exp.

    Nothing of the size of the scores is stored. A document's results do not depend on the others.

    Args:
        q: [tokens, num_heads, head_dim], f32 | bf16, last axis dense, head_dim at most 256.
        k, v: [tokens, num_kv_heads, head_dim], dtype of q; num_heads is a multiple of num_kv_heads,
            consecutive heads share a kv head.
        cu_seqlens: [documents + 1], int32; document d has the tokens cu_seqlens[d] to
            cu_seqlens[d + 1].
        scale: factor of the dot products, positive.
        window: keys that a row sees, itself included; 0 = all before it.

    Returns:
        out like q, and lse [num_heads, tokens], f32: log2(sum(exp(scale * q k^T))).

    Raises:
        ValueError: a shape, dtype or factor does not fit.
    """
    q, k, v = _detach(q), _detach(k), _detach(v)
    out = _empty(q, tuple(q.shape))
    shape = (int(q.shape[1]), int(q.shape[0]))
    lse = _empty_f32(q, shape)
    _C.packed_attention(out, lse, q, k, v, _detach(cu_seqlens), scale, window)
    return out, lse


def packed_attention_bwd(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens: Any,
    scale: float,
    window: int = 0,
) -> tuple[Any, Any, Any]:
    """Return the gradients (dq, dk, dv) of `packed_attention`.

    Args:
        dout: gradient of out, like q.
        q, k, v, cu_seqlens, scale, window: as they were given to `packed_attention`.
        out, lse: what it returned.

    Raises:
        ValueError: a shape, dtype or factor does not fit.
    """
    dout, q, k, v = _detach(dout), _detach(q), _detach(k), _detach(v)
    dq, dk, dv = (_empty(x, tuple(x.shape)) for x in (q, k, v))
    saved = (_detach(out), _detach(lse), _detach(cu_seqlens))
    _C.packed_attention_bwd(dq, dk, dv, dout, q, k, v, *saved, scale, window)
    return dq, dk, dv


def has_matmul() -> bool:
    """Whether the active level has `matmul`."""
    return _C.has_matmul()


def matmul(
    a: Any,
    b: Any,
    bias: Any | None = None,
    *,
    a_transposed: bool = False,
    b_transposed: bool = False,
    out: Any | None = None,
    add: bool = False,
) -> Any:
    """Return a @ b + bias of bfloat16 matrices; only at the level "amx" and on a GPU.

    Products of bf16, sums in float32 (at "amx" in ascending order), rounded once: with `add` only
    after the old values of out were added, too. On a GPU at most one operand is transposed, and k
    is not 0.

    Args:
        a: [m, k], bf16, last axis dense; [k, m] with `a_transposed`.
        b: [k, n], likewise; [n, k] with `b_transposed`.
        bias: [n], bf16, or None.
        a_transposed, b_transposed: the operand is stored transposed.
        out: [m, n], f32 | bf16, last axis dense; a new bf16 one by default.
        add: add to `out`, which must then be given, instead of overwriting it.

    Returns:
        out.

    Raises:
        ValueError: a shape or dtype does not fit, `add` without `out`, or the active level does not
            have it.
    """
    a, b = _detach(a), _detach(b)
    if out is None:
        if add:
            raise ValueError("[matmul] out is missing, expected an array to add to")
        out = _empty(
            a, (int(a.shape[1 if a_transposed else 0]), int(b.shape[0 if b_transposed else 1]))
        )
    _C.matmul(
        _detach(out), a, a_transposed, b, b_transposed, None if bias is None else _detach(bias), add
    )
    return out


def linear_xent(
    hidden: Any,
    weight: Any,
    targets: Any,
    scale: float = 1.0,
    grad: Any | None = None,
    dhidden: Any | None = None,
    dweight: Any | None = None,
    *,
    chunk_tokens: int = 1024,
) -> Any:
    """Return `log(softmax(scale * hidden @ weight.T))` at each row's target, on a GPU only.

    The logits of `chunk_tokens` tokens exist at a time, in bfloat16. With `grad` the gradients are
    written to `dhidden` and `dweight`, in the same pass.

    Args:
        hidden: [tokens, cols], bf16, cols a multiple of 8.
        weight: [vocab, cols], bf16, vocab a multiple of 8.
        targets: [tokens], int32 in [0, vocab), or -1: the result is 0 and the gradient zeros.
        scale: factor of the logits, positive: 1 / temperature.
        grad: [tokens], f32, gradient of the result, or None.
        dhidden: like hidden, receives its gradient; or None.
        dweight: [vocab, cols], f32 | bf16, receives weight's gradient; or None. In bf16 it is
            rounded once for each chunk.
        chunk_tokens: at least 1.

    Returns:
        [tokens], f32.

    Raises:
        ValueError: a shape, dtype or number does not fit, or the arrays are not on a GPU.
    """
    hidden = _detach(hidden)
    log_prob = _empty_f32(hidden, (int(hidden.shape[0]),))
    grad, dhidden, dweight = (None if x is None else _detach(x) for x in (grad, dhidden, dweight))
    inputs = (hidden, _detach(weight), _detach(targets), scale, grad)
    _C.linear_xent(log_prob, *inputs, dhidden, dweight, chunk_tokens)
    return log_prob


def squared_norm(x: Any) -> float:
    """Return the sum of x**2 over all elements, float32 in blocks of 4096, float64 over them.

    Args:
        x: f32 | bf16, dense, of any shape.

    Raises:
        ValueError: the dtype or layout does not fit.
    """
    return _C.squared_norm(_detach(x))


def adamw(
    master: Any,
    mean: Any,
    square: Any,
    grad: Any,
    parameter: Any | None = None,
    *,
    step: int,
    rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> None:
    """Take one step of AdamW (arXiv 1711.05101) in place, with g = grad_scale * grad.

    `mean = beta1 * mean + (1 - beta1) * g`, `square = beta2 * square + (1 - beta2) * g**2` and
    `master -= rate * (weight_decay * master + mean / c1 / (sqrt(square / c2) + eps))`, where
    `c = 1 - beta**step`.

    Args:
        master, mean, square: f32, dense, of one shape.
        grad: f32 | bf16, dense, of that shape.
        parameter: bf16, dense, of that shape: receives the rounded master; or None.
        step: of this update, from 1.
        rate: learning rate.
        beta1, beta2, eps, weight_decay: as in the formulas.
        grad_scale: factor of the gradient, for clipping.

    Raises:
        ValueError: a shape, dtype or option does not fit.
    """
    _C.adamw(
        _detach(master),
        _detach(mean),
        _detach(square),
        _detach(grad),
        None if parameter is None else _detach(parameter),
        step,
        rate,
        beta1,
        beta2,
        eps,
        weight_decay,
        grad_scale,
    )


def mlp(out: Any, x: Any, gate: Any, up: Any, down: Any, *, invariant: bool = False) -> Any:
    """Add a gated MLP to the residual stream: `out += (silu(x @ gate.T) * (x @ up.T)) @ down.T`.

    The same numbers as `linear`, `swiglu` and `linear` in turn, bit for bit, except with 4-bit
    weights above "scalar" and as many rows of x as `linear` says, without `invariant`: then the
    inner activations are rounded to int8 in blocks of 512 columns as they leave the first GEMM.

    Args:
        out: [tokens, hidden_out], f32, last axis dense; added to in place.
        x: [tokens, hidden], f32, last axis dense.
        gate, up: [inter, hidden], f32 | bf16, last axis dense, or PackedWeights.
        down: [hidden_out, inter], likewise.
        invariant: for 4-bit weights, keep the bits of a row independent of the number of rows.

    Returns:
        out.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _C.mlp(_detach(out), _detach(x), _detach(gate), _detach(up), _detach(down), invariant)
    return out


def gather(ids: Any, table: Any) -> Any:
    """Return rows `ids` of the table as float32, on a GPU as bfloat16.

    Args:
        ids: [tokens], int32, each in [0, rows).
        table: [rows, cols], f32 | bf16, last axis dense, or a PackedWeight or GpuWeight.

    Returns:
        [tokens, cols], an array of the kind of ids.

    Raises:
        ValueError: an id is outside the table, or a shape or dtype does not fit.
    """
    ids = _detach(ids)
    shape = (int(ids.shape[0]), int(table.shape[1]))
    narrow = _on_gpu(ids)
    out = _empty(ids.new_empty((0,)).bfloat16(), shape) if narrow else _empty_f32(ids, shape)
    _C.gather(out, ids, _detach(table))
    return out


def argmax(x: Any) -> int:
    """Return the index of the largest element, the first one of equals; NaN never wins.

    Args:
        x: [n], f32, dense, n > 0.

    Raises:
        ValueError: a shape or dtype does not fit.
        RuntimeError: x has nothing but NaN.
    """
    return int(_C.argmax(_detach(x)))


def log_sum_exp(x: Any) -> float:
    """Return `log(sum(exp(x)))`, rounded to float32; the same bits for any number of threads.

    NaN when x has a NaN, otherwise inf when it has inf, and -inf when all of it is -inf.

    Args:
        x: [n], f32, dense, n > 0.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    return float(_C.log_sum_exp(_detach(x)))


class KvPages(NamedTuple):
    """A pool of KV cache pages of one layer (the layout inside is in csrc/kernels/args.h).

    Attributes:
        pool: int32 [pages, kv_page_bytes(...) // 4], dense.
        page_tokens: tokens per page, a multiple of 32.
        num_kv_heads: key-value heads.
        head_dim: size of a head, a multiple of 16 up to 256.
        dtype: "f32" | "bf16" | "int8", how keys and values are stored; int8 with one scale for a
            token's key in a head and one for its value.
        key_scale: with int8, positive factors [num_kv_heads, head_dim] f32 that keys are divided by
            before they are rounded and queries multiplied with, or None.
    """

    pool: Any
    page_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    key_scale: Any | None = None


class SequenceSpan(NamedTuple):
    """The rows of one sequence within a batch.

    Attributes:
        query_begin: its first row in q, k, v and the output.
        query_count: its rows, at consecutive positions that end at kv_len.
        kv_len: tokens of the sequence, these rows included.
        page_table: page numbers, at least ceil(kv_len / page_tokens).
    """

    query_begin: int
    query_count: int
    kv_len: int
    page_table: list[int]


def kv_page_bytes(page_tokens: int, num_kv_heads: int, head_dim: int, dtype: str) -> int:
    """Return the bytes of one page of one layer.

    Raises:
        ValueError: a size is not one that `KvPages` allows.
    """
    size: int = _C.kv_page_bytes(page_tokens, num_kv_heads, head_dim, dtype)
    return size


def kv_append(pages: KvPages, k: Any, v: Any, spans: list[SequenceSpan]) -> None:
    """Write the keys and values of every span's rows to their slots.

    A page is zeroed when its first slot is written.

    Args:
        pages: the cache, updated in place.
        k: [tokens, num_kv_heads, head_dim] f32, last axis dense.
        v: like k.
        spans: which rows belong to which sequence.

    Raises:
        ValueError: a shape or dtype does not fit, or a span lies outside its tensors.
    """
    _C.kv_append(pages, _detach(k), _detach(v), spans)


def attention(
    q: Any,
    pages: KvPages,
    spans: list[SequenceSpan],
    scale: float | None = None,
    window: int = 0,
    query_scale: Any | None = None,
    out: Any | None = None,
) -> Any:
    """Return causal softmax(scale * q k^T) v over the cached keys and values.

    The row at position p of its sequence sees the keys max(0, p + 1 - window) to p. Its result
    does not depend, bit for bit, on the other rows of the batch or on the number of threads.

    Args:
        q: [tokens, num_heads, head_dim] f32, last axis dense. num_heads is a multiple of the
            cache's num_kv_heads; consecutive heads share a kv head.
        pages: the cache, with the keys and values of these rows already appended.
        spans: which rows belong to which sequence. Rows of no span stay as they are in out.
        scale: factor of the dot products, 1 / sqrt(head_dim) by default.
        window: keys that a row sees, itself included; 0 = all before it.
        query_scale: [tokens] f32, an extra factor of each row's dot products (LogN), or None.
        out: like q, where to write; allocated by default.

    Raises:
        ValueError: a shape, dtype or factor does not fit, or a span lies outside its tensors.
    """
    q = _detach(q)
    if out is None:
        out = _empty(q, tuple(q.shape))
    factor = float(pages.head_dim) ** -0.5 if scale is None else scale
    _C.attention(_detach(out), q, pages, spans, factor, window, query_scale)
    return out


WEIGHT_FORMATS = ("f32", "bf16", "int8", "int8_grouped", "int4_symmetric", "int4")
SOURCE_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)


def pack_weight(
    data: npt.NDArray[np.uint8], source: str, shape: tuple[int, int], format: str
) -> PackedWeight:
    """Convert a tensor of a checkpoint to one of the engine's formats.

    Exact: Q8_0, Q5_0 and Q4_0 to "int8_grouped", Q4_0 to "int4_symmetric", everything to "f32",
    BF16 to "bf16". "int8" takes one scale per row, that of its largest element. Everything else
    takes, per group of 32 columns, the scale (and min) found to minimise the squared error. Every
    instruction-set level gives the same bytes.

    Args:
        data: the tensor's bytes, uint8, contiguous, at any address.
        source: ggml's name of their type, one of `SOURCE_TYPES`.
        shape: (rows, cols), the cols a whole number of the type's blocks.
        format: one of `WEIGHT_FORMATS`.

    Returns:
        The weight with its `format`, `shape`, `rows`, `cols`, `nbytes` and `data`, a read-only view
        of its bytes, uint8, laid out as in csrc/kernels/quant_layout.h. `PackedWeight(data, format,
        rows, cols)` makes a weight of such bytes.

    Raises:
        ValueError: a name is unknown, the byte count does not fit the shape, or (quantised formats
            only) a weight is infinite, NaN or beyond the format's scales; the message names its
            row and column.
    """
    return _C.pack_weight(data, source, *shape, format)


def gpu_weight_bytes(format: str, shape: tuple[int, int]) -> int:
    """Return the bytes of a weight in a GPU's layout, a multiple of 4.

    Raises:
        ValueError: the format is none of "bf16", "int8", "int8_grouped" and "int4_symmetric".
    """
    return _C.gpu_weight_bytes(format, *shape)


def gpu_weight(packed: Any, format: str, shape: tuple[int, int]) -> GpuWeight:
    """Return a weight in the layout of a GPU's kernels, for `linear`, `mlp` and `gather` there.

    Args:
        packed: the bytes of a PackedWeight as int32 [bytes / 4] on the GPU, which may go as soon
            as the work queued here is done:
            `torch.from_numpy(weight.data.view("i4")).cuda()`.
        format: the PackedWeight's, "int8", "int8_grouped" or "int4_symmetric".
        shape: (rows, cols).

    Returns:
        The weight with its `format`, `shape` and `data`, an array of the kind of `packed`.

    Raises:
        ValueError: the format is another, the array is not on a GPU or has another size.
    """
    data = _empty(packed, (_C.gpu_weight_bytes(format, *shape) // 4,))
    return _C.gpu_weight(data, _detach(packed), format, *shape)


def unpack_weight(weight: PackedWeight) -> npt.NDArray[np.float32]:
    """Return the float32 matrix [rows, cols] that a packed weight stands for."""
    return _C.unpack_weight(weight)


def decode_source(
    data: npt.NDArray[np.uint8], source: str, shape: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Return a checkpoint's tensor as a float32 matrix [rows, cols]; see `pack_weight`.

    Raises:
        ValueError: the source type is unknown, or the byte count does not fit the shape.
    """
    return _C.decode_source(data, source, *shape)
