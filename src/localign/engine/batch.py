"""What the loop does with a task's micro-batches, whatever else they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from localign import rng


def sample_digest(batch: Any) -> int:
    """A number for a set of (position, index) pairs; the sum over sets is that of their union."""
    pairs = rng.mix_pairs(batch.positions, batch.indices)
    return int(pairs.sum()) % (1 << 64)


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """The tensor fields of a batch, by name."""
    return {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device; positions and indices stay with the host, which uses them."""
    moving = {name: t for name, t in tensors_of(batch).items() if name not in ("positions", "indices")}
    return batch._replace(**{name: t.to(device, non_blocking=True) for name, t in moving.items()})
