"""Tells a fault of the machine from a fault of a file.

A bad image is named, and another sample takes its place. If a full memory or a failing disk did the same, the stream of
samples would change without a word. So a fault of the machine is tried again or ends the run.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from localign.errors import RunFailure, RunStopped, UserError
from localign.text.printing import printable

T = TypeVar("T")

RETRY_DELAYS = (0.1, 1.0, 5.0)
"""Seconds before each new attempt to read a file; the last failure ends the run."""
# What the operating system says about one file. Every other error number is about the machine.
_OF_THE_FILE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EACCES,
        errno.EPERM,
        errno.ENXIO,
        errno.EILSEQ,
    }
)
_REMEDIES = {
    errno.EMFILE: "; raise the limit of open files (ulimit -n) or give fewer --workers",
    errno.ENFILE: "; the machine has too many open files",
    errno.ENOMEM: "; give fewer --workers or a smaller batch",
}
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")


def is_machine_fault(error: BaseException) -> bool:
    """Whether an error says something about the machine: no memory, or a disk or network that fails."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _OF_THE_FILE
    # Pillow and torch report a lack of memory as plain OSError and RuntimeError.
    in_words = isinstance(error, OSError | RuntimeError)
    return in_words and any(words in str(error) for words in _OUT_OF_MEMORY)


@contextmanager
def machine_faults(name: str) -> Iterator[None]:
    """Turn faults of the machine into RunFailure; every other exception passes.

    Args:
        name: What was read, for the error line.
    """
    try:
        yield
    except (RunFailure, RunStopped, UserError):
        raise
    except Exception as error:
        if not is_machine_fault(error):
            raise
        raise RunFailure(_line(error, name)) from None


def retried(action: Callable[[], T], name: str) -> T:
    """Run an action; after a fault of the machine, run it again after each of ``RETRY_DELAYS``.

    Raises:
        RunFailure: The fault lasts.
    """
    for delay in RETRY_DELAYS:
        try:
            return action()
        except (OSError, MemoryError) as error:
            if not is_machine_fault(error):
                raise
        time.sleep(delay)
    with machine_faults(name):
        return action()


def _line(error: Exception, name: str) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        number = errno.ENOMEM
    reason = "out of memory" if number == errno.ENOMEM else getattr(error, "strerror", None) or str(error)
    return (
        f"{printable(name)} cannot be read: {printable(reason)}. This is a fault of the machine, not of the file, "
        f"so the file is not skipped{_REMEDIES.get(number, '')}"
    )
