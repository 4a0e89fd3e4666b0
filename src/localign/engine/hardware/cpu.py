"""Two CPU settings for training.

- :func:`fast_float32_matmul` has an effect on AMD processors with AVX-512 only. torch multiplies float32 matrices
  with MKL, which does not use AVX-512 on AMD processors; oneDNN does.
- :func:`keep_freed_memory` changes two thresholds of glibc's malloc.

`benchmarks/` has the step times with and without each of them.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
_SIDE = 64


@contextmanager
def fast_float32_matmul(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices with oneDNN inside the block, on an AMD processor with AVX-512; else do nothing.

    The products stay float32 products; only the order of summation changes. torch offers one way to choose oneDNN:
    to permit bfloat16. oneDNN makes use of that permission only on processors with matrix units for bfloat16
    (AMX), so a processor that does round keeps MKL. The vendor decides rather than a timing, so that a resumed run
    makes the same choice.
    """
    if device.type != "cpu" or not _mkl_is_slow():
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        if _rounds():
            matmul.fp32_precision = before
        yield
    finally:
        matmul.fp32_precision = before


def _mkl_is_slow() -> bool:
    """Whether this is an AMD processor with AVX-512 and torch has both libraries."""
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call,unused-ignore]
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call,unused-ignore]
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_mkl and has_onednn and avx512 and _CPUINFO.is_file() and "AuthenticAMD" in _CPUINFO.read_text()


def _rounds() -> bool:
    """Whether float32 products lose bits. The factors below survive only with all 24 bits of the significand."""
    factors = torch.full((_SIDE, _SIDE), 1 + 2**-23)
    identity = torch.eye(_SIDE)
    batched = torch.bmm(factors.expand(2, -1, -1), identity.expand(2, -1, -1))[1]
    return not all(torch.equal(product, factors) for product in (factors @ identity, batched))


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from `malloc.h`: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, both in bytes."""
_TRAINING_THRESHOLD = 1 << 30
_DEFAULT_THRESHOLD = 32 << 20
"""glibc raises its own threshold up to this value in a process that frees large blocks."""


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """Keep freed memory in the process inside the block, on a CPU with glibc; else do nothing.

    glibc returns large blocks to the kernel when they are freed. A training step frees all its activations, so without
    this setting the kernel zeroes the same pages again in every step. The process holds the memory of its largest
    step until the block ends.
    """
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    # Setting a threshold stops glibc from adjusting it. The mmap threshold comes first: the other needs it.
    changed = libc.mallopt(_MMAP_THRESHOLD, _TRAINING_THRESHOLD) and libc.mallopt(
        _TRIM_THRESHOLD, _TRAINING_THRESHOLD
    )
    try:
        yield
    finally:
        if changed:
            libc.mallopt(_MMAP_THRESHOLD, _DEFAULT_THRESHOLD)
            libc.mallopt(_TRIM_THRESHOLD, 2 * _DEFAULT_THRESHOLD)
            trim_heap()


def trim_heap() -> None:
    """Return freed memory to the kernel, where the C library is glibc."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
