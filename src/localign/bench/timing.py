"""Wall and CPU time of a call, and the hardware."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds that something took."""

    wall: float
    cpu: float
    """CPU time of this process and all its threads, which is steadier on a busy machine."""

    def over(self, other: Timing) -> Timing:
        """The ratio of this time to another time."""
        return Timing(self.wall / other.wall, self.cpu / other.cpu)

    @staticmethod
    def best(timings: Sequence[Timing]) -> Timing:
        """The minimum of repeated measurements, for each clock."""
        return Timing(min(t.wall for t in timings), min(t.cpu for t in timings))

    @staticmethod
    def median(timings: Sequence[Timing]) -> Timing:
        """The median of repeated measurements, for each clock."""
        return Timing(statistics.median(t.wall for t in timings), statistics.median(t.cpu for t in timings))

    @staticmethod
    def total(timings: Iterable[Timing]) -> Timing:
        """The sum of several times."""
        walls, cpus = zip(*((t.wall, t.cpu) for t in timings), strict=True)
        return Timing(sum(walls), sum(cpus))


def timed(function: Callable[[], T], device: torch.device) -> tuple[T, Timing]:
    """A call's result and its time, including the work that the device still has to finish."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, Timing(time.perf_counter() - wall, time.process_time() - cpu)


class Hardware(TypedDict):
    """The hardware of a measurement."""

    device: str
    processor: str
    """Name of the GPU or CPU."""
    threads: int


def hardware(device: torch.device) -> Hardware:
    """The hardware of a measurement on a device."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {"device": str(device), "processor": name, "threads": torch.get_num_threads()}
