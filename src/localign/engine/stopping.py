"""Being asked to stop: SIGTERM and SIGUSR1, which batch systems send before the time is up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
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


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the signals only leave a note, however often they come; afterwards they do what they did before.

    Outside of the main thread, where Python sets no signal handlers, no request ever comes.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.by = signal.Signals(number).name  # and nothing else: a handler may interrupt any line

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None: it was not set from Python, and Python cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave_stopping_to_main() -> None:
    """For loader workers: a signal to all processes of a job must not take them away from the step in progress."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
