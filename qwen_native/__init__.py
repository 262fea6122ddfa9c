"""A native engine for the Qwen language models, with hand-written CPU kernels."""

from __future__ import annotations

from qwen_native._C import __version__

__all__ = ["__version__"]
