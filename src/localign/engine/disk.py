"""Disks that fill up, turn read-only or go away."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from localign.errors import RunFailure


@contextmanager
def writing(path: Path, then: Callable[[], str] | None = None) -> Iterator[None]:
    """Inside, what cannot be written ends the run with one line.

    Args:
        path: Named in the line, where the error itself names no file.
        then: Says what comes next.

    Raises:
        RunFailure: In place of an error of the file system.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        line = f"cannot write {_place(error, path)}: {reason(error)}"
        with suppress(OSError):  # it may have to look at the same disk
            line += f"; {then()}" if then is not None else ""
        raise RunFailure(line) from error


def _place(error: Exception, path: Path) -> str:
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return os.fsdecode(named) if isinstance(named, str | bytes) else str(path)


def reason(error: BaseException) -> str:
    """An error of the file system in the system's words; safetensors wraps its own around them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if number := re.search(r"os error (\d+)", str(error)):
        return os.strerror(int(number.group(1)))
    return (str(error).splitlines() or [type(error).__name__])[0]
