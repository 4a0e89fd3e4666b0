"""How much memory a device has left, and how much a piece of work took at its peak."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from localign.engine.distributed import DistributedContext
from localign.engine.hardware.cpu import trim_heap
from localign.errors import UserError
from localign.options.train import TrainConfig

ROOM = 0.9
"""Share of the memory that may be used: batches differ, and an allocator needs some to move in."""
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 62
_FIRST = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_SECOND = "memory.max", "memory.current", "inactive_file"
"""Files of the two versions of control groups, and a field of memory.stat."""


class Meter(Protocol):
    """The memory of this rank."""

    budget: int
    """Bytes that the rank may come to at its peak."""

    def restart(self) -> None:
        """Forget the peak so far."""

    def peak(self) -> int:
        """Bytes since then, at most at a time."""


def check_measurable(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError where the memory that a run is to be fitted into cannot be known."""
    if config.micro_batch != "auto":
        return
    if device.type == "cuda" or (device.type == "cpu" and (_PROC / "self" / "clear_refs").exists()):
        return
    raise UserError(
        f"--micro-batch auto measures the memory of CUDA GPUs and, on Linux, of CPUs, not of {device.type} here; "
        "give a number"
    )


def meter(context: DistributedContext) -> Meter:
    """The meter of a rank's device. The ranks of a node share its main memory."""
    return CudaMeter(context.device) if context.device.type == "cuda" else ProcessMeter(context.local_size)


class CudaMeter:
    """What torch's allocator hands out, of what it has and what is free beside it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        free, _ = torch.cuda.mem_get_info(device)
        self.budget = int(ROOM * (free + torch.cuda.memory_reserved(device)))

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


class ProcessMeter:
    """What a process has in main memory, as Linux counts it.

    Args:
        sharers: Processes that will need as much at the same time.
    """

    def __init__(self, sharers: int) -> None:
        self.budget = _status("VmRSS") + int(ROOM * available()) // sharers

    def restart(self) -> None:
        trim_heap()  # training keeps it, and it is no part of what comes next
        (_PROC / "self" / "clear_refs").write_text("5")

    def peak(self) -> int:
        return _status("VmHWM")


def available() -> int:
    """Bytes of main memory that can still be taken without swapping, within the limits of all control groups."""
    least = _amount(_PROC / "meminfo", "MemAvailable")
    for line in (_PROC / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            least = min(least, _left(_CGROUPS / "memory", path, _FIRST))
        elif not controllers:
            least = min(least, _left(_CGROUPS, path, _SECOND))
    return max(0, least)


def _left(root: Path, path: str, files: tuple[str, str, str]) -> int:
    """Bytes that a control group, and those it is in, may still take; what files in the cache take can be had."""
    limit, usage, cached = files
    least, group = _NO_LIMIT, root / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root) or not (folder / limit).is_file():
            continue  # a container sees its own group as the root, under another path
        told = (folder / limit).read_text().strip()
        if told != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            least = min(least, int(told) - int((folder / usage).read_text()) + int(stat[cached]))
    return least


def _status(field: str) -> int:
    return _amount(_PROC / "self" / "status", field)


def _amount(file: Path, field: str) -> int:
    """A field of a file of Linux's, bytes; it is in kB there."""
    return 1024 * next(
        int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(f"{field}:")
    )
