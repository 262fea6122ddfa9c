"""Memory that ends where an inaccessible page begins, like the last tensor of a mapped file."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def at_page_end(data: np.ndarray) -> Iterator[np.ndarray]:
    """A copy of data (uint8 [n]) whose next byte cannot be read."""
    page = mmap.PAGESIZE
    size = -(-data.size // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    guard = ctypes.c_void_p(address + size)
    assert libc.mprotect(guard, ctypes.c_size_t(page), 0) == 0
    copy = np.frombuffer(memory, np.uint8, size)[size - data.size :]
    copy[:] = data
    yield copy
    assert libc.mprotect(guard, ctypes.c_size_t(page), mmap.PROT_READ) == 0
