"""The frequencies of rotary position embeddings, as the engine computes them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from qwen_native.config import ModelConfig


def rope_frequencies(config: ModelConfig, length: int = 0) -> npt.NDArray[np.float32]:
    """Angle per position of each pair of dimensions, [rope_dim / 2], as in model/rope_table.cpp.

    Args:
        config: with YaRN (arXiv 2309.00071) or dynamic NTK, if any.
        length: of the document, for dynamic NTK; up to `seq_length` it changes nothing.
    """
    base, d = config.rope_theta, config.rope_dim
    if config.use_dynamic_ntk and length > config.seq_length:
        alpha = 2.0 ** math.ceil(math.log2(length / config.seq_length) + 1.0) - 1.0
        base *= alpha ** (d / (d - 2))
    frequencies = (1.0 / base ** (np.arange(0, d, 2) / d)).astype(np.float32)
    if config.yarn is None:
        return frequencies
    yarn = config.yarn

    def dimension(rotations: float) -> float:
        wavelengths = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return d * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), d - 1)
    ramp = ((np.arange(d // 2) - low) / max(high - low, 0.001)).clip(0, 1)
    kept = frequencies.astype(np.float64)
    mixed: npt.NDArray[np.float64] = kept / yarn.factor * ramp + kept * (1 - ramp)
    return mixed.astype(np.float32)
