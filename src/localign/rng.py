"""Random draws as pure functions of (seed, purpose, index).

Nothing in localign keeps a random state that would have to be saved. A draw is keyed by the run's seed, the name of
its purpose, and the global position of its sample or step. So the number of ranks and loader workers does not change a
run, and a resumed run draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def key(seed: int, purpose: str, *index: int) -> int:
    """A 64-bit key for (seed, purpose, index), the same on every machine and Python version."""
    text = f"{seed}|{purpose}|{'|'.join(str(i) for i in index)}"
    return int.from_bytes(
        hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little"
    )


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A NumPy generator keyed by (seed, purpose, index)."""
    return np.random.Generator(np.random.Philox(key(seed, purpose, *index)))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 tensors; multiplication wraps modulo 2**64."""

    def shift_right(v: Tensor, bits: int) -> Tensor:  # a logical shift; that of int64 is arithmetic
        return (v >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ shift_right(x, 31)


def _signed(x: int) -> int:
    x &= _MASK64
    return x - (1 << 64) if x >= 1 << 63 else x


def uniform(seed: int, purpose: str, positions: Tensor, columns: int) -> Tensor:
    """Uniform draws for many samples at once. Each row depends only on its own position.

    Args:
        seed: The run's seed.
        purpose: Name of the draws' purpose. Draws for different purposes are independent.
        positions: int64 ``(rows,)``, global sample positions or steps.
        columns: Draws per row.

    Returns:
        float64 ``(rows, columns)`` in [0, 1), on the CPU.
    """
    rows = positions.detach().to("cpu", torch.int64)
    golden = _signed(0x9E3779B97F4A7C15)
    row_keys = _mix(_mix(rows + _signed(key(seed, purpose))) + golden)
    counters = torch.arange(1, columns + 1, dtype=torch.int64) * golden
    bits = _mix(row_keys[:, None] + counters[None, :])
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


@contextmanager
def seeded_globals(seed: int, purpose: str, *index: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global CPU generators inside the block, and restore them afterwards.

    For libraries that draw from the global generators.
    """
    state = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    value = key(seed, purpose, *index)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)  # noqa: NPY002
    torch.default_generator.manual_seed(value >> 1)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        torch.random.set_rng_state(state[2])


def mix_pairs(first: Tensor, second: Tensor) -> Tensor:
    """Hash each pair of int64 numbers to an int64 number. Sums of the hashes are digests that ignore order."""
    return _mix(_mix(first.to("cpu", torch.int64)) + second.to("cpu", torch.int64))
