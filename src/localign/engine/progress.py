"""Progress on standard error: a bar on a terminal, plain lines elsewhere, as schedulers keep them in files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from localign.text.printing import console, printable

ProgressCallback = Callable[[str, int, int], None]
"""Called with the name of a stage, how many of its items are done, and how many there are."""

INTERVAL = 30.0
"""Seconds between two plain lines."""
_BAR_WIDTH = 20
_FIXED_WIDTH = _BAR_WIDTH + len("  100%   0:00:00 left ")
"""Columns of the bar, the percentage and the remaining time."""
_NUMBERS = (
    ("loss", "loss", "{:.4f}"),
    ("grad", "grad_norm", "{:.2f}"),
    ("lr", "lr", "{:.1e}"),
    ("data wait", "data_wait", "{:.0%}"),
)


class _Display(Protocol):
    def show(self, done: int, total: int) -> None: ...
    def numbers(self, entry: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Bar:
    """The progress of one stage.

    On a terminal it is a bar; numbers that do not fit beside it are left out, the least important first. Elsewhere it
    is one line every :data:`INTERVAL` seconds, and one for every validation.

    Args:
        label: The stage's name.
        total: Number of steps; 0 if it is not known yet.
        done: Steps that were done before.
    """

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._done, self._total = done, total
        self._display: _Display = (_Terminal if sys.stderr.isatty() else _Lines)(label, total, done)

    def advance(self) -> None:
        """Advance by one step."""
        self.update(self._done + 1, self._total)

    def update(self, done: int, total: int) -> None:
        """Set how many of how many steps are done."""
        self._done, self._total = done, total
        self._display.show(done, total)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Show the numbers of a log entry."""
        self._display.numbers(entry)

    def close(self) -> None:
        """Remove the bar."""
        self._display.close()


class _Terminal:
    def __init__(self, label: str, total: int, done: int) -> None:
        self._console = console(stderr=True)
        self._label_width = len(printable(label))
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(_BAR_WIDTH),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self._console,
        )
        self._task = self._progress.add_task(label, total=total, completed=done, numbers="")
        self._progress.start()
        self._entry: dict[str, Any] = {}

    def show(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total, numbers=self._fitting(done, total))

    def numbers(self, entry: Mapping[str, Any]) -> None:
        self._entry |= entry

    def close(self) -> None:
        self._progress.stop()

    def _fitting(self, done: int, total: int) -> str:
        """The numbers that fit into the terminal's width beside the rest, the most important first."""
        left = self._console.width - self._label_width - _FIXED_WIDTH
        shown: list[str] = []
        rate, *others = _numbers(self._entry) or [""]
        for number in (rate, *others[:1], f"{done:,}/{total:,}", *others[1:]):
            if number and len(number) + 2 <= left:
                shown.append(number)
                left -= len(number) + 2
        return "  ".join(shown)


class _Lines:
    def __init__(self, label: str, total: int, done: int) -> None:
        self._label, self._start = label, done
        self._done, self._total = done, total
        self._began = self._said = time.monotonic()
        self._entry: dict[str, Any] = {}

    def show(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        if time.monotonic() - self._said >= INTERVAL and done < total:
            self._say(_numbers(self._entry))

    def numbers(self, entry: Mapping[str, Any]) -> None:
        self._entry |= entry
        validation = {k: v for k, v in entry.items() if k.startswith("val_") and isinstance(v, float)}
        if validation:
            self._say([f"{name} {value:.4f}" for name, value in validation.items()])

    def close(self) -> None:
        pass

    def _say(self, numbers: list[str]) -> None:
        now = time.monotonic()
        if (moved := self._done - self._start) > 0 and self._done < self._total:
            seconds = (now - self._began) / moved * (self._total - self._done)
            numbers = [*numbers, f"{timedelta(seconds=round(seconds))} left"]
        share = f" ({self._done / self._total:.0%})" if self._total else ""
        line = "  ".join([f"{self._label} {self._done:,}/{self._total:,}{share}", *numbers])
        print(printable(line), file=sys.stderr, flush=True)
        self._said = now


def _numbers(entry: Mapping[str, Any]) -> list[str]:
    """A log entry's numbers for the user, the most important first."""
    rates = (name for name in entry if name.endswith("_per_second"))
    shown = (*((f"{name.removesuffix('_per_second')}/s", name, "{:.0f}") for name in rates), *_NUMBERS)
    return [f"{label} {form.format(entry[key])}" for label, key, form in shown if key in entry]


@contextmanager
def progress_bars(shown: bool = True) -> Iterator[ProgressCallback]:
    """A function that shows the progress of each stage that it is called with; every bar is gone at the end.

    Args:
        shown: False for ranks other than the main one: the function then does nothing.
    """
    bars: dict[str, Bar] = {}

    def update(stage: str, done: int, total: int) -> None:
        if not shown:
            return
        if stage not in bars:
            bars[stage] = Bar(stage, total)
        bars[stage].update(done, total)
        if total and done >= total:
            bars.pop(stage).close()

    try:
        yield update
    finally:
        for bar in bars.values():
            bar.close()
