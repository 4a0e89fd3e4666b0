"""What the C library does with memory that a step has freed and the next one will want again."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of `malloc.h`: bytes free at the end of the heap, and bytes of a block, from which on the kernel gets them back."""
_KEPT = 1 << 30
_USUAL = 32 << 20
"""What glibc's own threshold rises to in a process that frees large blocks."""


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Inside, memory that is freed stays with the process, on a CPU and with glibc; elsewhere nothing changes.

    glibc gives large blocks back to the kernel when they are freed. A training step frees all its activations, so that
    every step would have the kernel fill the same pages with zeros again. Kept, a process holds what its largest step
    took; afterwards it is given back.
    """
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    # A threshold that is set no longer moves by itself; the other is set first, as it is of no use without.
    kept = libc.mallopt(_MMAP_THRESHOLD, _KEPT) and libc.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        if kept:
            libc.mallopt(_MMAP_THRESHOLD, _USUAL)
            libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
            give_back_freed_memory()


def give_back_freed_memory() -> None:
    """Hand what is freed, and still with the process, to the kernel, where the C library is glibc."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is GNU's."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
