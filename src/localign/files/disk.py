"""One-line errors for disks that are full, read-only or gone."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from localign.errors import RunFailure
from localign.text.printing import printable

_SAFETENSORS = re.compile(r"os error (\d+)")
_REMEDIES = {
    errno.ENOSPC: "free some space, then run the command again",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "check its permissions, or choose another path",
    errno.EPERM: "check its permissions, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
}
if hasattr(errno, "EDQUOT"):
    _REMEDIES[errno.EDQUOT] = "free some space, then run the command again"


def disk_errors() -> tuple[type[Exception], ...]:
    """OSError, and SafetensorError where that library is in use. For ``except``."""
    safetensors = sys.modules.get("safetensors")  # not imported here: it is slow, and help must come at once
    return (OSError,) if safetensors is None else (OSError, safetensors.SafetensorError)


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
    except disk_errors() as error:
        line = f"cannot write {_place(error) or printable(path)}: {reason(error)}"
        with suppress(OSError):  # the hint may read the same disk
            line += f"; {then()}" if then is not None else ""
        raise RunFailure(line) from error


def describe(error: Exception) -> str:
    """A file system error as one line: the file, what is wrong with it, and what to do."""
    place = _place(error)
    line = f"{place}: {reason(error)}" if place else reason(error)
    remedy = _REMEDIES.get(_number(error) or 0)
    return f"{line}; {remedy}" if remedy else line


def _place(error: Exception) -> str:
    """The file that an error names; empty if it names none."""
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return printable(os.fsdecode(named)) if isinstance(named, str | bytes | os.PathLike) else ""


def reason(error: BaseException) -> str:
    """The operating system's message for a file system error, without what safetensors or a loader worker add."""
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror)
    if number := _SAFETENSORS.search(str(error)):
        return os.strerror(int(number.group(1)))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = (
        lines[-1] if lines[0].startswith("Caught ") else lines[0]
    )  # a worker's error has its traceback before it
    return printable(re.sub(r"^(\w+: )?\[Errno \d+\] ", "", line))


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    number = _SAFETENSORS.search(str(error)) or re.search(r"\[Errno (\d+)\]", str(error))
    return int(number.group(1)) if number else None
