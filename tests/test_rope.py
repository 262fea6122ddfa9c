"""qwen_native/rope.py against transformers, and against the original Qwen's formula."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import tiny_training
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen_native.config import YarnScaling
from qwen_native.rope import rope_frequencies

CONFIG = dataclasses.replace(tiny_training.model().config, rope_dim=32, head_dim=32)


@pytest.mark.parametrize("factor", [None, 4.0, 2.5])
@pytest.mark.parametrize("theta", [10000.0, 1000000.0])
def test_frequencies_are_those_of_transformers(theta, factor):
    original = 4096
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    parameters = {"rope_theta": theta, **(scaling if factor else {"rope_type": "default"})}
    theirs = Qwen2Config(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=original,
        rope_parameters=parameters,
    )  # fmt: skip
    if factor is None:
        expected = [theta ** (-2 * i / 32) for i in range(16)]
        yarn = None
    else:
        expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
        yarn = YarnScaling(factor, original, attention_factor, 32.0, 1.0)
    config = dataclasses.replace(CONFIG, rope_theta=theta, yarn=yarn)
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)


def test_dynamic_ntk_is_the_original_qwens():
    config = dataclasses.replace(
        CONFIG, architecture="qwen", num_kv_heads=4, tie_word_embeddings=False,
        use_dynamic_ntk=True, seq_length=100,
    )  # fmt: skip
    plain = rope_frequencies(CONFIG)
    assert np.array_equal(rope_frequencies(config, 100), plain)
    # modeling_qwen.py: alpha = 2 ** ceil(log2(length / seq_length) + 1) - 1.
    for length, alpha in ((101, 3), (200, 3), (201, 7), (400, 7)):
        base = 10000.0 * alpha ** (32 / 30)
        expected = [math.exp(-math.log(base) * 2 * i / 32) for i in range(16)]
        np.testing.assert_allclose(rope_frequencies(config, length), expected, rtol=1e-6)
