"""Independent work on many items, in several processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset

from localign.data.workers import data_loader, served

T = TypeVar("T")


class _Worker(Dataset[Any]):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, items: list[Any]) -> Any:
        return self.function(items[0])


def in_processes(
    function: Callable[[Any], T], items: Iterable[Any], count: int, processes: int, what: str
) -> Iterator[T]:
    """What a function makes of each item, in order, with a bar on a terminal.

    Args:
        function: Goes to other processes, with whatever it holds.
        items: What it takes, ``count`` of them.
        count: How many.
        processes: 0 works in this one.
        what: Is done, for the bar.

    Raises:
        RunFailure: A process died.
    """
    loader = data_loader(_Worker(function), lambda: ([item] for item in items), processes, False, None)
    console = Console(stderr=True)
    yield from track(served(loader), what, count, console=console, disable=not sys.stderr.isatty())


def parts(count: int, most: int = 256) -> list[tuple[int, int]]:
    """0..count in consecutive (begin, end) of at most so many."""
    return [(begin, min(begin + most, count)) for begin in range(0, count, most)]
