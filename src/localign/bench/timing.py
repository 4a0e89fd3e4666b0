"""Wall and processor time of a call, and what it ran on."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """How long something took, in seconds."""

    wall: float
    cpu: float
    """Of this process and all its threads; on a busy machine the steadier of the two."""

    def over(self, other: Timing) -> Timing:
        """How many times the other's time this is."""
        return Timing(self.wall / other.wall, self.cpu / other.cpu)

    @staticmethod
    def best(timings: Sequence[Timing]) -> Timing:
        """The least of repeated measurements."""
        return Timing(min(t.wall for t in timings), min(t.cpu for t in timings))

    @staticmethod
    def median(timings: Sequence[Timing]) -> Timing:
        """The middle one of repeated measurements, of either time."""
        return Timing(statistics.median(t.wall for t in timings), statistics.median(t.cpu for t in timings))

    @staticmethod
    def total(timings: Iterable[Timing]) -> Timing:
        """Of one thing after the other."""
        walls, cpus = zip(*((t.wall, t.cpu) for t in timings), strict=True)
        return Timing(sum(walls), sum(cpus))


def timed(function: Callable[[], T], device: torch.device) -> tuple[T, Timing]:
    """A call's result and its time, with what the device still had to do."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, Timing(time.perf_counter() - wall, time.process_time() - cpu)


def hardware(device: torch.device) -> dict[str, Any]:
    """What a measurement ran on."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {"device": str(device), "processor": name, "threads": torch.get_num_threads()}
