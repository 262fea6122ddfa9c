"""The differentiable ops of the model on the package's own kernels.

The same functions as in `reference`, for tensors in float32 or bfloat16 on the CPU, and on a GPU as
far as `ops` goes there (`attention` in bfloat16 alone). Each is a `torch.library` custom op under
"qwen_native::" with its gradient, so that torch.compile traces through it; gradients of gradients
are not provided. Accumulation is float32 throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen_native import ops

# The logits of this many bytes are held at a time, or of an eighth of the tokens: a bfloat16
# gradient of the weight is rounded once for each part.
_LOGITS_BYTES = 160 << 20
_LARGEST_NUMBER_OF_PARTS = 8
_DENSE = torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    """x with a dense last axis."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """x as a matrix of rows with a dense last axis."""
    return _dense(x.reshape(-1, x.shape[-1]))


@torch.library.custom_op("qwen_native::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = ops.rms_norm(_rows(x), weight, eps)
    return out if x.ndim == 2 else out.view(x.shape)  # as in _linear


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("qwen_native::rms_norm_bwd", mutates_args=())
def _rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, residual_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    other = None if residual_grad is None else _rows(residual_grad)
    dx, dweight = ops.rms_norm_bwd(_rows(dy), _rows(x), weight, eps, other)
    return dx.view(x.shape), dweight


@_rms_norm_bwd.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, residual_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    return *_rms_norm_bwd(dy, x, weight, ctx.eps, None), None


_rms_norm.register_autograd(_rms_norm_backward, setup_context=_rms_norm_setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).

    Args:
        x: [..., cols], float32 or bfloat16; the mean is over the last dimension.
        weight: [cols], float32 or bfloat16.
        eps: added to the mean square.

    Returns:
        Like x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    out: Tensor = _rms_norm(x, weight, eps)
    return out


@torch.library.custom_op("qwen_native::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual.clone(memory_format=torch.contiguous_format)
    out: Tensor = ops.rms_norm(_rows(x), weight, eps, _rows(total))
    return out.view(x.shape), total


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add_rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _add_rms_norm_backward(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    total, weight = ctx.saved_tensors
    if dy is None:
        return dtotal, dtotal, None, None
    dx, dweight = _rms_norm_bwd(dy, total, weight, ctx.eps, dtotal)
    return dx, dx, dweight, None


_add_rms_norm.register_autograd(_add_rms_norm_backward, setup_context=_add_rms_norm_setup)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(s), s) for s = residual + x, rounded to their dtype.

    Args:
        x: [..., cols], float32 or bfloat16.
        residual: like x.
        weight: [cols], float32 or bfloat16.
        eps: added to the mean square.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    out, total = _add_rms_norm(x, residual, weight, eps)
    return out, total


@torch.library.custom_op("qwen_native::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out: Tensor = ops.rope(x.clone(memory_format=torch.contiguous_format), cos, sin)
    return out


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    cos, sin = ctx.saved_tensors
    return _rope(grad, cos, -sin), None, None


_rope.register_autograd(_rope_backward, setup_context=_rope_setup)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + rope_dim / 2) of each head by their angles (arXiv 2104.09864).

    The angles get no gradient.

    Args:
        x: [tokens, heads, head_dim], float32 or bfloat16; dimensions beyond rope_dim pass through.
        cos: [tokens, rope_dim / 2], float32.
        sin: like cos.

    Returns:
        Like x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    out: Tensor = _rope(x, cos, sin)
    return out


@torch.library.custom_op("qwen_native::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    rows = _rows(gate)
    out: Tensor = ops.swiglu(rows, _rows(up), torch.empty_like(rows, memory_format=_DENSE))
    return out.view(gate.shape)


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("qwen_native::swiglu_bwd", mutates_args=())
def _swiglu_bwd(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = ops.swiglu_bwd(_rows(dout), _rows(gate), _rows(up))
    return dgate.view(gate.shape), dup.view(gate.shape)


@_swiglu_bwd.register_fake
def _(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _swiglu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _swiglu_bwd(dout, *ctx.saved_tensors)
    return dgate, dup


_swiglu.register_autograd(_swiglu_backward, setup_context=_swiglu_setup)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (arXiv 2002.05202).

    Args:
        gate: [tokens, inter], float32 or bfloat16.
        up: like gate.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    out: Tensor = _swiglu(gate, up)
    return out


@torch.library.custom_op("qwen_native::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    q, k, v = _dense(q), _dense(k), _dense(v)
    out, lse = ops.packed_attention(q, k, v, cu_seqlens, scale, window)
    return out, lse


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("qwen_native::attention_bwd", mutates_args=())
def _attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = _dense(dout), _dense(q), _dense(k), _dense(v)
    return ops.packed_attention_bwd(dout, q, k, v, out, lse, cu_seqlens, scale, window)


@_attention_bwd.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.scale, ctx.window = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)


def _attention_backward(
    ctx: Any, dout: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
    if dout is None:
        return (None,) * 6
    grads = _attention_bwd(dout, *ctx.saved_tensors, ctx.scale, ctx.window)
    return *grads, None, None, None


_attention.register_autograd(_attention_backward, setup_context=_attention_setup)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int = 0
) -> Tensor:
    """Return causal softmax(scale q k^T) v within each document (arXiv 2307.08691).

    Nothing of the size of the scores is stored. A document's result does not depend on the others.

    Args:
        q: [tokens, num_heads, head_dim], float32 or bfloat16, head_dim at most 256.
        k: [tokens, num_kv_heads, head_dim]; query head h reads head h * num_kv_heads / num_heads.
        v: like k.
        cu_seqlens: [documents + 1], int32; document d has the tokens cu_seqlens[d] to
            cu_seqlens[d + 1].
        scale: factor of the scores, positive.
        window: how many tokens a query sees, itself included; 0 for all before it.

    Returns:
        Like q.

    Raises:
        ValueError: a shape, dtype or factor does not fit.
    """
    out: Tensor = _attention(q, k, v, cu_seqlens, scale, window)[0]
    return out


def _chunked(x: Tensor) -> bool:
    """Whether a GPU's kernels can multiply with the matrix (see `ops`)."""
    sizes = (*x.shape, x.stride(0)) if len(x) > 1 else x.shape
    return 0 not in x.shape and not any(size % 8 for size in sizes[1:]) and x.data_ptr() % 16 == 0


def _have_matmul(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "cuda":
        return _chunked(a) and _chunked(b)
    return a.device.type == "cpu" and ops.has_matmul()


def product(
    a: Tensor,
    b: Tensor,
    *,
    a_transposed: bool = False,
    b_transposed: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """Return a b + bias of matrices.

    In bfloat16 our kernel multiplies, on a CPU whose level has it and on a GPU matrices whose sizes
    are multiples of 8; otherwise torch.

    Args:
        a: [m, k], or [k, m] with `a_transposed`.
        b: [k, n], or [n, k] with `b_transposed`, of the same dtype.
        bias: [n], or None.
        out: [m, n], where the result goes; default: a new matrix.
        add: add to `out`.
    """
    if a.dtype == b.dtype == torch.bfloat16 and _have_matmul(a, b):
        result: Tensor = ops.matmul(
            _dense(a),
            _dense(b),
            bias,
            a_transposed=a_transposed,
            b_transposed=b_transposed,
            out=out,
            add=add,
        )
        return result
    a, b = a.T if a_transposed else a, b.T if b_transposed else b
    if add and out is not None:
        return out.addmm_(a, b)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b)


@torch.library.custom_op("qwen_native::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = product(_rows(x), weight, b_transposed=True, bias=bias)
    # Not a view where it can be avoided: autograd lets nobody add to one in place, as LoRA does.
    return out if x.ndim == 2 else out.view(*x.shape[:-1], -1)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("qwen_native::linear_bwd", mutates_args=())
def _linear_bwd(
    dout: Tensor, x: Tensor | None, weight: Tensor, x_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, none = _rows(dout), weight.new_empty(0)
    dx = product(rows, weight).view(*dout.shape[:-1], -1) if x_grad else none.clone()
    dweight = none if x is None else product(rows, _rows(x), a_transposed=True)
    return dx, dweight, rows.sum(0) if bias_grad else none.clone()


@_linear_bwd.register_fake
def _(
    dout: Tensor, x: Tensor | None, weight: Tensor, x_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        weight.new_empty((*dout.shape[:-1], weight.shape[1]) if x_grad else (0,)),
        weight.new_empty((0,) if x is None else weight.shape),
        weight.new_empty(weight.shape[:1] if bias_grad else (0,)),
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    # The gradient of a frozen weight, and with it x, is not needed.
    saved = (x, weight) if ctx.needs_input_grad[1] else (weight,)
    ctx.save_for_backward(*saved)


def _linear_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    *x, weight = ctx.saved_tensors
    x_grad, weight_grad, bias_grad = ctx.needs_input_grad
    grads = _linear_bwd(dout, x[0] if x else None, weight, x_grad, bias_grad)
    wanted = (x_grad, weight_grad, bias_grad)
    dx, dweight, dbias = (g if needed else None for g, needed in zip(grads, wanted, strict=True))
    return dx, dweight, dbias


_linear.register_autograd(_linear_backward, setup_context=_linear_setup)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias.

    Args:
        x: [..., cols], float32 or bfloat16.
        weight: [rows, cols], of the same dtype.
        bias: [rows], of the same dtype, or None.

    Returns:
        [..., rows].

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    out: Tensor = _linear(x, weight, bias)
    return out


def _native_targets(targets: Tensor, vocab: int, ignore_index: int | None) -> Tensor:
    """As int32, -1 where a token does not count."""
    counted = torch.ones_like(targets, dtype=torch.bool)
    if ignore_index is not None:
        counted = targets != ignore_index
    wrong = counted & ((targets < 0) | (targets >= vocab))
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{place}] is {int(targets[place])}, expected 0 to {vocab - 1}"
            + ("" if ignore_index is None else f" or the ignore_index {ignore_index}")
        )
    return torch.where(counted, targets, -1).to(torch.int32)


def _check_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}, expected"
            " [tokens, hidden] and [vocab, hidden]"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, expected {weight.dtype} as weight is")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {targets.dtype} {list(targets.shape)}, expected int64 [{len(hidden)}]"
        )


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float,
    grad: Tensor | None,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of int32 targets and, with their `grad`, the gradients that are asked for.

    One part of the tokens after the other, so that the logits are never there as a whole.
    """
    tokens, vocab = len(hidden), len(weight)
    log_prob = hidden.new_empty(tokens, dtype=torch.float32)
    dhidden = torch.empty_like(hidden, memory_format=_DENSE) if hidden_grad else hidden.new_empty(0)
    dweight = weight.new_empty(weight.shape if weight_grad else (0,))
    if tokens == 0:
        dweight.zero_()
    step = max(_LOGITS_BYTES // (vocab * hidden.itemsize), -(-tokens // _LARGEST_NUMBER_OF_PARTS))
    step = max(step // 32 * 32, min(step, 32), 1)
    if hidden.device.type == "cuda" and hidden.dtype == torch.bfloat16:
        hidden, weight = _dense(hidden), _dense(weight)
        if len(weight) % 8 == 0 and _chunked(hidden) and _chunked(weight):
            log_prob = ops.linear_xent(
                hidden,
                weight,
                targets,
                scale,
                grad,
                dhidden if hidden_grad else None,
                dweight if weight_grad else None,
                chunk_tokens=step,
            )
            return log_prob, dhidden, dweight
    for begin in range(0, tokens, step):
        part = slice(begin, begin + step)
        logits = product(hidden[part], weight, b_transposed=True)
        part_grad = None if grad is None else grad[part]
        log_prob[part] = ops.softmax_xent(logits, targets[part], scale, part_grad)
        if hidden_grad:
            product(logits, weight, out=dhidden[part])
        if weight_grad:
            product(logits, hidden[part], a_transposed=True, out=dweight, add=begin > 0)
    return log_prob, dhidden, dweight


def _fake_grads(
    hidden: Tensor, weight: Tensor, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if hidden_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
    )


@torch.library.custom_op("qwen_native::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_head(hidden, weight, targets)
    native = _native_targets(targets, len(weight), ignore_index)
    grad = None
    if hidden_grad or weight_grad:
        grad = hidden.new_full((len(hidden),), -1.0, dtype=torch.float32)
    log_prob, dhidden, dweight = _sweep(hidden, weight, native, 1.0, grad, hidden_grad, weight_grad)
    return -log_prob.sum(dtype=torch.float64).float(), dhidden, dweight


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, *_fake_grads(hidden, weight, hidden_grad, weight_grad)


def _linear_cross_entropy_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, dhidden, dweight = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.save_for_backward(dhidden, dweight)
    ctx.hidden_grad, ctx.weight_grad = inputs[4:]


def _linear_cross_entropy_backward(
    ctx: Any, grad: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    dhidden, dweight = ctx.saved_tensors
    # In place, or the matrix of the vocabulary's size would be there twice; torch then refuses a
    # second walk through a retained graph. What traces the graph has tensors of its own type.
    scaled = Tensor.mul_ if type(dweight) is Tensor else torch.mul
    return (
        scaled(dhidden, grad) if ctx.hidden_grad else None,
        scaled(dweight, grad) if ctx.weight_grad else None,
        *(None,) * 4,
    )


_linear_cross_entropy.register_autograd(
    _linear_cross_entropy_backward, setup_context=_linear_cross_entropy_setup
)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """Return the sum of -log(softmax(hidden weight^T))[target] over the tokens that count.

    The logits exist for a part of the tokens at a time; loss and gradients come from one sweep, in
    the forward pass.

    Args:
        hidden: [tokens, hidden], float32 or bfloat16.
        weight: [vocab, hidden], of the same dtype.
        targets: [tokens], int64, in [0, vocab), or `ignore_index` where a token does not count.
        ignore_index: see targets.

    Returns:
        A float32 scalar; divide by the number of tokens that count.

    Raises:
        ValueError: a target is outside the vocabulary, or a shape or dtype does not fit.
    """
    differentiate = torch.is_grad_enabled()
    loss: Tensor = _linear_cross_entropy(
        hidden,
        weight,
        targets,
        ignore_index,
        differentiate and hidden.requires_grad,
        differentiate and weight.requires_grad,
    )[0]
    return loss


@torch.library.custom_op("qwen_native::linear_log_prob", mutates_args=())
def _linear_log_prob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    _check_head(hidden, weight, targets)
    native = _native_targets(targets, len(weight), None)
    return _sweep(hidden, weight, native, 1.0 / temperature, None, False, False)[0]


@_linear_log_prob.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return hidden.new_empty(hidden.shape[:1], dtype=torch.float32)


@torch.library.custom_op("qwen_native::linear_log_prob_bwd", mutates_args=())
def _linear_log_prob_bwd(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    native, scale = _native_targets(targets, len(weight), None), 1.0 / temperature
    sweep = _sweep(hidden, weight, native, scale, grad.contiguous(), hidden_grad, weight_grad)
    return sweep[1], sweep[2]


@_linear_log_prob_bwd.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    return _fake_grads(hidden, weight, hidden_grad, weight_grad)


def _linear_log_prob_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, targets, ctx.temperature = inputs
    ctx.save_for_backward(hidden, weight, targets)


def _linear_log_prob_backward(
    ctx: Any, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None]:
    hidden, weight, targets = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    dhidden, dweight = _linear_log_prob_bwd(grad, hidden, weight, targets, ctx.temperature, *wanted)
    return dhidden if wanted[0] else None, dweight if wanted[1] else None, None, None


_linear_log_prob.register_autograd(_linear_log_prob_backward, setup_context=_linear_log_prob_setup)


def linear_log_prob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return log(softmax(hidden weight^T / temperature))[target] of every token.

    The logits exist for a part of the tokens at a time, and are computed again for the gradients.

    Args:
        hidden: [tokens, hidden], float32 or bfloat16.
        weight: [vocab, hidden], of the same dtype.
        targets: [tokens], int64, in [0, vocab).
        temperature: divides the logits, positive.

    Returns:
        [tokens], float32.

    Raises:
        ValueError: the temperature is not positive, a target is outside the vocabulary, or a shape
            or dtype does not fit.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    log_prob: Tensor = _linear_log_prob(hidden, weight, targets, temperature)
    return log_prob
