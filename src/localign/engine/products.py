"""Which library multiplies float32 matrices on a CPU.

torch has two: MKL, which it takes, and oneDNN. MKL leaves the wider half of the vector units (AVX-512) unused on
processors that are not Intel's, oneDNN does not.
"""

from __future__ import annotations

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
