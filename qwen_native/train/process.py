"""What training asks of its process: memory that is kept, and one set of threads."""

from __future__ import annotations

import os

import torch

from qwen_native import _C, ops


def prepare_process(device: torch.device, kernels: str, dtype: torch.dtype) -> None:
    """Set the process up for training on the CPU, for good; elsewhere do nothing.

    Freed memory stays with the process (every step needs the same again), on huge pages. And where
    our kernels do all the products (bfloat16 at the level "amx"), torch gets one thread: its pool's
    threads would go on spinning beside those of ours after each of its small operations.

    A system that does not let its memory be kept has slower steps, nothing else.

    Args:
        device: where the model is.
        kernels: of the model, "native" or "reference".
        dtype: of the model's matrices.
    """
    if device.type != "cpu":
        return
    _C.keep_heap(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    if kernels == "native" and dtype == torch.bfloat16 and ops.has_matmul():
        torch.set_num_threads(1)
