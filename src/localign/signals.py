"""SIGTERM and SIGUSR1, which schedulers send before the time limit of a job."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    by: str | None = None

    @property
    def made(self) -> bool:
        """Whether there is one."""
        return self.by is not None


_requests: list[StopRequest] = []
"""Of the blocks that note signals at this moment."""


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Inside, a signal ends the process with one line; training, which saves first, takes the signals over."""
    process = os.getpid()

    def end(number: int) -> None:
        if os.getpid() != process:  # a worker, which its parent may end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come within one.
            os.write(2, f"localign: ended by {signal.Signals(number).name}\n".encode())
        raise SystemExit(128 + number)

    with _handled_by(end):
        yield


@contextmanager
def second_interrupt_ends() -> Iterator[None]:
    """Inside, the first Ctrl-C raises KeyboardInterrupt, so that everything is cleaned up; the second ends at once."""
    process = os.getpid()
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a shell's background jobs
    if is_ignored or threading.current_thread() is not threading.main_thread():
        yield
        return

    def second(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            os.write(2, b"localign: interrupted again; ended at once\n")
        os._exit(1)

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, second)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        # After an interrupt the second handler stays: the interpreter, too, can be interrupted while it ends.
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, a signal is only noted, however often it comes."""
    request = StopRequest()

    def note(number: int) -> None:
        request.by = signal.Signals(number).name  # and nothing else: a handler may interrupt any line

    _requests.append(request)
    try:
        with _handled_by(note):
            yield request
    finally:
        _requests.remove(request)


def stop_requested() -> str | None:
    """The signal that :func:`stop_requests` has noted, for code that waits; None if there is none."""
    return next((request.by for request in _requests if request.made), None)


@contextmanager
def _handled_by(handle: Callable[[int], None]) -> Iterator[None]:
    """Inside the block, signals call ``handle``; afterwards the previous handlers are restored.

    Outside of the main thread, where Python sets no signal handlers, this does nothing.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        handle(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            # None: it was not set from Python, and Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


def ignore_signals() -> None:
    """For loader workers: a signal to all processes of a job must not end them during a step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
