"""Micro-batches as the loop sees them: their sample ids, and their tensors on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from localign import rng


def sample_digest(batch: Any) -> int:
    """A 64-bit digest of a set of (position, index) pairs. Digests of disjoint sets add up, modulo 2**64."""
    pairs = rng.mix_pairs(batch.positions, batch.indices)
    return int(pairs.sum()) % (1 << 64)


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """The tensor fields of a batch, by name."""
    return {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}


def to_device(batch: Any, device: torch.device) -> Any:
    """A copy of the batch with its tensors on the device. Positions and indices stay on the CPU."""
    moving = {name: t for name, t in tensors_of(batch).items() if name not in ("positions", "indices")}
    return batch._replace(**{name: t.to(device, non_blocking=True) for name, t in moving.items()})
