"""Where features fit: the GPU's memory, main memory, or neither."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from localign.engine.distributed import DistributedContext

MEMORY_SHARE = 0.5
"""Share of the free memory that features may take with ``--cache auto``."""


def memory_device(total_bytes: int, context: DistributedContext) -> torch.device | None:
    """The device whose memory has room for features: the GPU, the CPU, or None if neither has room.

    On every rank the features may take half of the free memory.

    Args:
        total_bytes: Size of the features over all ranks.
        context: The ranks and their device.
    """
    device = context.device
    gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    fits_gpu, fits_ram = (
        total_bytes / context.size <= MEMORY_SHARE * gpu,
        total_bytes <= MEMORY_SHARE * free_ram(),
    )
    fits = context.all_gather_object((fits_gpu, fits_ram))
    if all(on_gpu for on_gpu, _ in fits):
        return device
    return torch.device("cpu") if all(in_ram for _, in_ram in fits) else None


def free_ram() -> int:
    """Bytes of main memory that are available for new data."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
