"""What generation produces: completions, and the text of one while it grows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from qwen_native.chat import RenderedPrompt
from qwen_native.tokenizer import StreamDecoder


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of one request. In a batch they include the work for its neighbours.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        generated_tokens: Tokens generated.
        first_token_seconds: From the request to its first token.
        total_seconds: From the request to its last token.
    """

    prompt_tokens: int
    generated_tokens: int
    first_token_seconds: float
    total_seconds: float

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed after the first token; 0 when there was only one."""
        seconds = self.total_seconds - self.first_token_seconds
        return (self.generated_tokens - 1) / seconds if self.generated_tokens > 1 else 0.0


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt.

    Attributes:
        text: The new text; ends before a stop text. Empty for a checkpoint without a tokenizer.
        token_ids: The new tokens, a stop token at the end included.
        logprobs: Log-probability of each token, or None when not asked for.
        top_logprobs: For each token the most probable alternatives as (id, log-probability), or
            None when not asked for.
        finish_reason: "stop" (stop token or stop text) or "length".
        timings: How long it took.
        prompt: How a chat was turned into tokens (`LLM.chat` only).
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    top_logprobs: list[list[tuple[int, float]]] | None
    finish_reason: str
    timings: Timings
    prompt: RenderedPrompt | None = None

    def __str__(self) -> str:
        return self.text


@dataclass
class Output:
    """One continuation while it grows: tokens in, released text out.

    Attributes:
        ready: Text that has been released since the caller last took it.
        finish_reason: None while it grows.
        error: Why it could not go on; its `completion` then raises.
    """

    prompt_tokens: int
    stop_texts: tuple[str, ...]
    decoder: StreamDecoder | None
    started: float  # time.perf_counter() of the request
    with_logprobs: bool
    with_top: bool
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)  # released text
    held: str = ""  # may be the start of a stop text
    ready: str = ""
    finish_reason: str | None = None
    error: str = ""
    first_token: float = 0.0
    last_token: float = 0.0

    def push(
        self, token: int, logprob: float | None, top: list[tuple[int, float]], finish: str | None
    ) -> None:
        """Take the next token; `finish` is the engine's reason when it is the last one."""
        self.last_token = time.perf_counter()
        if not self.token_ids:
            self.first_token = self.last_token
        self.token_ids.append(token)
        if self.with_logprobs:
            assert logprob is not None
            self.logprobs.append(logprob)
        if self.with_top:
            self.top.append(top)
        self.finish_reason = finish
        if self.decoder is None:
            return
        if finish != "stop":
            self._release(self.decoder.push(token))
        if self.finish_reason is not None:
            self._release(self.decoder.finish())
            self._emit(self.held)
            self.held = ""

    def _release(self, text: str) -> None:
        """Release text up to a stop text, or to what may become one."""
        self.held += text
        if not self.held:
            return
        found = [(self.held.find(stop), stop) for stop in self.stop_texts]
        ends = [(start + len(stop), start) for start, stop in found if start >= 0]
        if ends:
            _, start = min(ends)  # the one that is complete first, however the text was cut
            self._emit(self.held[:start])
            self.held = ""
            self.stop_texts = ()
            self.finish_reason = "stop"
            return
        keep = max((_overlap(self.held, stop) for stop in self.stop_texts), default=0)
        self._emit(self.held[: len(self.held) - keep])
        self.held = self.held[len(self.held) - keep :]

    def _emit(self, text: str) -> None:
        if text:
            self.text.append(text)
            self.ready += text

    def fail(self, error: str) -> None:
        """End without a token."""
        self.finish_reason = "error"
        self.error = error

    def take(self) -> str:
        """Return the text that has been released since the last call."""
        text, self.ready = self.ready, ""
        return text

    def completion(self, rendered: RenderedPrompt | None) -> Completion:
        """Return the finished continuation.

        Raises:
            RuntimeError: The model gave logits that no token can be chosen from.
        """
        if self.error:
            raise RuntimeError(self.error)
        assert self.finish_reason is not None
        return Completion(
            "".join(self.text),
            self.token_ids,
            self.logprobs if self.with_logprobs else None,
            self.top if self.with_top else None,
            self.finish_reason,
            Timings(
                self.prompt_tokens,
                len(self.token_ids),
                self.first_token - self.started,
                self.last_token - self.started,
            ),
            rendered,
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`, shorter than `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
