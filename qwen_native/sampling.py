"""How tokens are chosen, and when generation ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

# What Qwen's chat checkpoints say in their generation_config.json, for files that have none (GGUF).
# Their repetition penalty differs from size to size; it is left out, so that greedy stays greedy.
_CHAT_DEFAULTS = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


@dataclass(frozen=True)
class SamplingOptions:
    """Options of one generation; what is not given comes from the checkpoint's generation_config.

    Attributes:
        max_new_tokens: Most tokens to generate; None = until the context is full.
        temperature: Divides the logits; 0 = greedy.
        top_k: Keep the k most probable tokens; 0 = all.
        top_p: Keep the fewest tokens whose probabilities sum to at least this; 1 = all.
        min_p: Drop tokens less probable than this fraction of the most probable one; 0 = none.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that occur in
            the prompt or the output (arXiv 1909.05858); 1 = off.
        presence_penalty: Subtracted from the logits of tokens that the output already has.
        frequency_penalty: Subtracted once for each time that the output has the token.
        logit_bias: Added to the logits of single tokens, by id.
        seed: Makes the output repeatable; None = different each time.
        stop: Texts that end the output; they are not part of it.
        stop_ids: Token ids that end the output, added to the checkpoint's own.
        ignore_eos: Do not stop at the checkpoint's own end tokens.
        n: Number of independent continuations; the i-th uses seed + i.
        logprobs: None = no log-probabilities; k = those of the chosen tokens and of the k most
            probable alternatives. They are of the model's own distribution, before penalties,
            bias and temperature.
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any], *, is_chat_model: bool
    ) -> SamplingOptions:
        """Take the defaults of a checkpoint.

        `do_sample: false` means greedy. A chat checkpoint whose config names no sampling option at
        all gets the values that Qwen's chat checkpoints publish.
        """
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
        values = {name: config[name] for name in names if config.get(name) is not None}
        if config.get("do_sample") is False:
            values["temperature"] = 0.0
        elif is_chat_model and "do_sample" not in config and not values:
            values = dict(_CHAT_DEFAULTS)
        return cls().updated(**values)

    def updated(self, **changes: Any) -> SamplingOptions:
        """Return a copy with some options changed, all checked.

        Raises:
            TypeError: there is no such option.
            ValueError: a value is out of range.
        """
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise TypeError(f"there is no option {name!r}; expected one of {sorted(known)}")
        options = replace(self, **changes)
        options._check()
        return options

    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts, always as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _check(self) -> None:
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, low_open=True)
        _check_number("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        _check_number("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _check_integer("top_k", self.top_k, 0)
        _check_integer("n", self.n, 1)
        if self.max_new_tokens is not None:
            _check_integer("max_new_tokens", self.max_new_tokens, 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0)
        for text in self.stop_texts():
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop has {text!r}, expected non-empty texts")
        for token in self.stop_ids:
            _check_integer("stop_ids", token, 0)


def _check_number(
    name: str, value: object, low: float, high: float, *, low_open: bool = False
) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if ok:
        assert isinstance(value, (int, float))
        ok = low <= value <= high and not (low_open and value == low)
    if not ok:
        bounds = f"{'more than' if low_open else 'at least'} {low}" if low > -math.inf else ""
        bounds += f"{' and ' if bounds else ''}at most {high}" if high < math.inf else ""
        raise ValueError(f"{name} is {value!r}, expected a finite number {bounds}".rstrip())


def _check_integer(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {low}")
