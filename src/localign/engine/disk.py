"""One-line errors for disks that are full, read-only or gone."""

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
    """Turn file system errors inside the block into a RunFailure with one line.

    Args:
        path: Named in the line if the error names no file.
        then: Returns a hint to append, such as how to resume.

    Raises:
        RunFailure: The file system raised an error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        line = f"cannot write {_place(error, path)}: {reason(error)}"
        with suppress(OSError):  # the hint may read the same disk
            line += f"; {then()}" if then is not None else ""
        raise RunFailure(line) from error


def _place(error: Exception, path: Path) -> str:
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return os.fsdecode(named) if isinstance(named, str | bytes) else str(path)


def reason(error: BaseException) -> str:
    """The operating system's message for a file system error, without the text that safetensors adds."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if number := re.search(r"os error (\d+)", str(error)):
        return os.strerror(int(number.group(1)))
    return (str(error).splitlines() or [type(error).__name__])[0]
