"""qwen_native/sampling.py: defaults, overrides, errors."""

from __future__ import annotations

import pytest

from qwen_native.sampling import SamplingOptions


def test_defaults_come_from_the_generation_config():
    config = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.1,
    }
    options = SamplingOptions.from_generation_config(config, is_chat_model=True)
    assert (options.temperature, options.top_p, options.top_k) == (0.7, 0.8, 20)
    assert options.repetition_penalty == 1.1
    assert options.updated(temperature=0.0).temperature == 0.0
    assert options.temperature == 0.7  # updated() returns a copy


def test_do_sample_false_is_greedy():
    options = SamplingOptions.from_generation_config(
        {"do_sample": False, "top_p": 0.8}, is_chat_model=True
    )
    assert options.temperature == 0.0


def test_a_chat_model_without_a_config_gets_qwens_published_values():
    chat = SamplingOptions.from_generation_config({"eos_token_id": [1]}, is_chat_model=True)
    assert (chat.temperature, chat.top_p, chat.top_k) == (0.7, 0.8, 20)
    assert chat.repetition_penalty == 1.0
    base = SamplingOptions.from_generation_config({}, is_chat_model=False)
    assert base == SamplingOptions()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("repetition_penalty", 0),
        ("n", 0),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("seed", -1),
        ("logprobs", -1),
        ("stop", [""]),
        ("stop_ids", [-1]),
        ("presence_penalty", float("inf")),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingOptions().updated(**{name: value})


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="no option 'temprature'"):
        SamplingOptions().updated(temprature=1.0)


def test_stop_may_be_one_text():
    assert SamplingOptions().updated(stop="###").stop_texts() == ("###",)
    assert SamplingOptions().updated(stop=["a", "b"]).stop_texts() == ("a", "b")
