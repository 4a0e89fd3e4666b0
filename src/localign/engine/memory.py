"""What the C library does with memory that tensors free."""

from __future__ import annotations

import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of the two options of mallopt."""


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc keep up to a gigabyte of what is freed, for the process from now on.

    Otherwise a training step on a CPU gives most of its memory back to the system at its end and has it mapped
    and zeroed again, page by page, in the next: about a tenth of the time of small models.

    Returns:
        Whether the C library took it; others than glibc do not know it, and nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 * 2**20) and mallopt(_TRIM_THRESHOLD, 2**30))
