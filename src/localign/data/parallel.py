"""A function mapped over many items in several processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.progress import track
from torch.utils.data import Dataset

from localign.data.workers import data_loader, served
from localign.text.printing import console

T = TypeVar("T")


class _Worker(Dataset[Any]):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, items: list[Any]) -> Any:
        return self.function(items[0])


def in_processes(
    function: Callable[[Any], T], items: Iterable[Any], count: int, processes: int, description: str
) -> Iterator[T]:
    """Apply a function to each item and yield the results in order, with a progress bar on a terminal.

    Args:
        function: Picklable; it is sent to the worker processes.
        items: ``count`` arguments of the function.
        count: Number of items.
        processes: Worker processes; 0 runs the function in this process.
        description: Label of the progress bar.

    Raises:
        RunFailure: A worker process died.
    """
    loader = data_loader(_Worker(function), lambda: ([item] for item in items), processes, False, None)
    yield from track(
        served(loader), description, count, console=console(stderr=True), disable=not sys.stderr.isatty()
    )


def parts(count: int, size: int = 256) -> list[tuple[int, int]]:
    """Split 0..count into consecutive ranges (begin, end) of at most ``size`` items."""
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]
