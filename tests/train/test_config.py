"""Recipes: every key and type is checked, and the message names it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from qwen_native.train.config import OptimOptions, as_dict, build, load_config


@dataclass(frozen=True)
class Inner:
    rate: float
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    count: int = 3
    name: str | None = None
    files: tuple[str, ...] = ()
    flag: bool = False


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_sections_types_and_overrides(tmp_path):
    path = recipe(tmp_path, "inner: {rate: 3e-4}\nfiles: [x, y]\nflag: true\n")
    config = load_config(Outer, path, ["inner.mode=b", "count=1e3", "name=null"])
    assert config == Outer(Inner(3e-4, "b"), 1000, None, ("x", "y"), True)
    assert build(Outer, as_dict(config) | {"files": "one"}, "x").files == ("one",)


def test_overrides_alone_make_a_configuration():
    assert load_config(Outer, None, ["inner.rate=1"]) == Outer(Inner(1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner: {rate: 1, moed: b}", "inner.moed is not a known key; the nearest is inner.mode"),
        ("coutn: 1\ninner: {rate: 1}", "coutn is not a known key; the nearest is count"),
        ("count: 1", "inner is missing"),
        ("inner: {}", "inner.rate is missing"),
        ("inner: 5", "inner is 5, expected keys with values"),
        ("inner: {rate: fast}", "inner.rate is 'fast', expected a number"),
        ("inner: {rate: .nan}", "inner.rate is nan, expected a number"),
        ("inner: {rate: 1, mode: c}", "inner.mode is 'c', expected one of a, b"),
        ("inner: {rate: 1}\ncount: 1.5", "count is 1.5, expected a whole number"),
        ("inner: {rate: 1}\nflag: 1", "flag is 1, expected true or false"),
        ("inner: {rate: 1}\nfiles: [1]", r"files\[0\] is 1, expected a text"),
        ("[1]", r"is \[1\], expected keys with values"),
        ("a: [", "cannot be read"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path, text, message):
    path = recipe(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(Outer, path, [])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("count", "'count' is not an override, expected key=value"),
        ("count.x=1", "count is 3, which has no keys inside"),
        ("inner.rates=1", "inner.rates is not a known key"),
        ("count=[", "count: value"),
    ],
)
def test_mistaken_overrides(tmp_path, override, message):
    path = recipe(tmp_path, "inner: {rate: 1}\ncount: 3")
    with pytest.raises(ValueError, match=message):
        load_config(Outer, path, [override])


def test_values_out_of_range_are_named():
    with pytest.raises(ValueError, match="beta1 is 1.5, expected 0 to"):
        build(OptimOptions, {"learning_rate": 1.0, "beta1": 1.5}, "x")
    with pytest.raises(ValueError, match="both given"):
        OptimOptions(learning_rate=1.0, warmup_steps=5, warmup_ratio=0.1)
