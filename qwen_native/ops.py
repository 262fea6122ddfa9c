"""The engine's ops on numpy arrays or torch CPU tensors.

Every function takes numpy float32 arrays or torch tensors (float32 or bfloat16; moved across by
DLPack, without a copy) and returns an array of the same kind. They run on the active
instruction-set level (`set_isa`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_native import _C


def set_isa(name: str) -> None:
    """Switch the process to a level: "scalar", "avx2", "avx512" or "amx".

    Raises:
        ValueError: the name is not a level, or the host or the build does not have it.
    """
    _C.set_isa(name)


def available_isas() -> list[str]:
    """Levels that are built and that this host can run, lowest first."""
    order = ["scalar", "avx2", "avx512", "amx"]
    built = _C.built_isas()
    return [name for name in order[: order.index(_C.host_isa()) + 1] if name in built]


def _empty(like: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype=like.dtype)
    return like.new_empty(shape)


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
