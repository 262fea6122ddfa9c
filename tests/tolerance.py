"""When a kernel's result is accurate enough (docs/NUMERICS.md).

`ref` is a float64 reference on the same rounded inputs; `base` is plain torch in the kernel's
dtype. The limit is relative to what torch itself achieves: no test carries a hand-picked constant.
"""

from __future__ import annotations

import torch

_MANTISSA_BITS = {torch.float32: 23, torch.bfloat16: 7}
_SMALLEST_EXPONENT = -126


def epsilon(dtype: torch.dtype) -> float:
    """Distance from 1 to the next number of `dtype`."""
    return float(2.0 ** -_MANTISSA_BITS[dtype])


def ulp(ref: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Spacing of `dtype`'s numbers at |ref|."""
    exponent = torch.frexp(ref.abs().double()).exponent - 1
    exponent = exponent.clamp(min=_SMALLEST_EXPONENT).double()
    return torch.pow(2.0, exponent - _MANTISSA_BITS[dtype])


def assert_pointwise(out: torch.Tensor, ref: torch.Tensor, base: torch.Tensor) -> None:
    """Element-wise ops: at most twice torch's own worst error in ulps; 2 ulps always pass."""
    assert out.shape == ref.shape == base.shape
    if ref.numel() == 0:
        return
    assert torch.isfinite(out).all(), "output has NaN or infinity"
    unit = ulp(ref, out.dtype)
    error = ((out.double() - ref) / unit).abs().max().item()
    limit = max(2 * ((base.double() - ref) / unit).abs().max().item(), 2.0)
    assert error <= limit, f"error {error:.2f} ulp, limit {limit:.2f} ulp"


def assert_contraction(
    out: torch.Tensor, ref: torch.Tensor, base: torch.Tensor, factor: float = 2.0
) -> None:
    """Sums of products: at most `factor` times torch's own error, in maximum and in mean square."""
    assert out.shape == ref.shape == base.shape
    if ref.numel() == 0:
        return
    assert torch.isfinite(out).all(), "output has NaN or infinity"
    eps = epsilon(out.dtype)
    error, base_error = out.double() - ref, base.double() - ref
    size = ref.square().mean().sqrt().item()
    limit = factor * base_error.abs().max().item() + eps * size / 4
    largest = error.abs().max().item()
    assert largest <= limit, f"max error {largest:.3e}, limit {limit:.3e}"
    rms = error.square().mean().sqrt().item()
    rms_limit = factor * base_error.square().mean().sqrt().item() + eps * size / 16
    assert rms <= rms_limit, f"rms error {rms:.3e}, limit {rms_limit:.3e}"
