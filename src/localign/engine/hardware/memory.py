"""Memory that a device has left, and the peak of a piece of work. Main memory is read from Linux's /proc."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from localign.engine.distributed import DistributedContext
from localign.engine.hardware.cpu import trim_heap
from localign.errors import UserError
from localign.options.train import TrainConfig

MEMORY_SHARE = 0.9
"""Share of the memory that may be used; the rest is for larger batches and the allocator's fragmentation."""
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 62


class Meter(Protocol):
    """Measures the memory of this rank."""

    budget: int
    """Bytes that the rank may use at its peak."""

    def restart(self) -> None:
        """Reset the peak."""

    def peak(self) -> int:
        """The most bytes in use at one time since :meth:`restart`."""


def check_measurable(config: TrainConfig, device: torch.device) -> None:
    """Refuse `--micro-batch auto` on a device whose memory cannot be measured.

    Raises:
        UserError: It was given for such a device.
    """
    if config.micro_batch != "auto":
        return
    if device.type == "cuda" or (device.type == "cpu" and (_PROC / "self" / "clear_refs").exists()):
        return
    raise UserError(
        f"--micro-batch auto measures the memory of CUDA GPUs and, on Linux, of CPUs, not of {device.type} here; "
        "give a number"
    )


def meter(context: DistributedContext) -> Meter:
    """The meter of a rank's device. Ranks of one node share its main memory."""
    return CudaMeter(context.device) if context.device.type == "cuda" else ProcessMeter(context.local_size)


class CudaMeter:
    """Measures what torch's allocator hands out. The budget is its reserved memory and the device's free memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        free, _ = torch.cuda.mem_get_info(device)
        self.budget = int(MEMORY_SHARE * (free + torch.cuda.memory_reserved(device)))

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


class ProcessMeter:
    """Measures a process's resident memory, on Linux.

    Args:
        processes: How many processes share the free memory equally.
    """

    def __init__(self, processes: int) -> None:
        self.budget = _status("VmRSS") + int(MEMORY_SHARE * available()) // processes

    def restart(self) -> None:
        trim_heap()  # freed memory that the process still holds would count
        (_PROC / "self" / "clear_refs").write_text("5")

    def peak(self) -> int:
        return _status("VmHWM")


def available() -> int:
    """Bytes of main memory that this process can take without swapping, within its control groups' limits."""
    return max(0, min(_read_kib(_PROC / "meminfo", "MemAvailable"), _left_in_cgroups()))


def _left_in_cgroups() -> int:
    """Bytes left below the lowest `memory.max` of the process's control groups (version 2), page cache counted as free.

    A container sees its own group as the root of the file system, so groups that are not there are skipped.
    """
    lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    group = _CGROUPS / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    left = _NO_LIMIT
    for folder in (group, *group.parents):
        limit = folder / "memory.max"
        if folder.is_relative_to(_CGROUPS) and limit.is_file() and limit.read_text().strip() != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / "memory.current").read_text()) - int(stat["inactive_file"])
            left = min(left, int(limit.read_text()) - used)
    return left


def _status(field: str) -> int:
    return _read_kib(_PROC / "self" / "status", field)


def _read_kib(file: Path, field: str) -> int:
    """Bytes in a field of a file below /proc, which counts in KiB."""
    return 1024 * next(
        int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(f"{field}:")
    )
