"""CPU settings for training: float32 matrix products on AMD processors with AVX-512, and glibc's allocator.

torch has two libraries for matrix products: MKL, which it takes by default, and oneDNN. MKL leaves AVX-512 unused on
processors that Intel did not make; oneDNN uses it. On all other processors the products stay as torch has them.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_CPUINFO = Path("/proc/cpuinfo")
_SIDE = 64


@contextmanager
def fast_float32_products(device: torch.device) -> Iterator[None]:
    """Inside, float32 products on a CPU are oneDNN's where those are faster; elsewhere nothing changes.

    They are as exact as before, but sum in another order. torch's only way to oneDNN's products is to permit bfloat16
    in them, of which oneDNN makes use on processors with matrix units for bfloat16 alone (AMX). So a processor that
    rounds is left as it was; what is faster is told by the processor's make, not measured, so that a run that goes on
    later computes alike.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)  # torch's types do not know of it
    if matmul is None or device.type != "cpu" or not _mkl_is_slow():
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        if _rounds():
            matmul.fp32_precision = before
        yield
    finally:
        matmul.fp32_precision = before


def _mkl_is_slow() -> bool:
    """Whether this is a processor with AVX-512 that MKL does not use, and torch has both libraries."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return both and wide and _CPUINFO.is_file() and "AuthenticAMD" in _CPUINFO.read_text()


def _rounds() -> bool:
    """Whether products of float32 are rounded to fewer bits: all of 24 are needed for these factors to come back."""
    factors = torch.full((_SIDE, _SIDE), 1 + 2**-23)
    return any(
        not torch.equal(product, factors) for product in (factors @ torch.eye(_SIDE), _batched(factors))
    )


def _batched(factors: torch.Tensor) -> torch.Tensor:
    return torch.bmm(factors.expand(2, -1, -1), torch.eye(_SIDE).expand(2, -1, -1))[1]


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
