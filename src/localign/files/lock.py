"""Locks that let only one process write to a folder or a file. A lock file names its process and the command."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from localign.errors import UserError
from localign.text.printing import printable

LOCK_FILE = ".lock"
PATIENCE = 5.0
"""Seconds to wait for a process that was just killed to release the lock."""
_HOLDER, _COMMAND = "process ", "localign "


def lock(folder: Path, kind: str = "") -> TextIO | None:
    """Lock a folder until the returned file is closed or this process ends.

    The ranks of a killed launcher may still be running and writing. The lock stops a resumed run from writing to the
    same log and checkpoints.

    Args:
        folder: The folder; it exists.
        kind: The command that writes, such as ``probe``; the next :func:`take` returns it.

    Returns:
        The open lock file; None if the system or the file system does not support locks.

    Raises:
        UserError: Another process holds the lock.
        OSError: The folder cannot be written to.
    """
    return take(folder / LOCK_FILE, folder, kind)[0]


def take(path: Path, target: Path, kind: str = "") -> tuple[TextIO | None, frozenset[str]]:
    """Like :func:`lock`, with the lock file ``path`` for any ``target``; also returns the kinds that were in the file.

    A process that was killed, or whose output has no other mark of the command, leaves its kind.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            supported = _try(file)
        except BlockingIOError:
            file.seek(0)
            holder = printable((file.readline() or "unknown").strip())
            file.close()
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            raise UserError(
                f"another process is writing to {printable(target)} ({holder}); end that process first"
            ) from None
        if not _is_current(file, path):  # another process has removed it meanwhile
            file.close()
            continue
        try:
            before = _kinds_in(file)
            write_kinds(file, {*before, kind})
        except (OSError, UserError):
            if os.fstat(file.fileno()).st_size == 0:
                path.unlink()
            with suppress(OSError):  # the buffer cannot be written either
                file.close()
            raise
        if not supported:
            file.close()
        return (file if supported else None), before


def _try(file: TextIO) -> bool:
    """Lock an open file. Returns False if locks are not supported. Raises BlockingIOError if it is locked."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        # lockf: forked loader workers do not inherit the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise BlockingIOError from error
    except OSError:
        return False
    return True


def _is_current(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _kinds_in(file: TextIO) -> frozenset[str]:
    # From the open file: on POSIX, closing any other handle of the file would release the lock.
    file.seek(0)
    first, *others = [*file.read(4096).splitlines(), ""]
    if first and not first.startswith(_HOLDER):
        raise UserError(f"{printable(file.name)} is not a lock of localign; remove it, or give another --out")
    return frozenset(line.removeprefix(_COMMAND) for line in others if line.startswith(_COMMAND))


def write_kinds(file: TextIO, kinds: Iterable[str]) -> None:
    """Write this process and the commands into an open lock file."""
    file.seek(0)
    file.truncate()
    lines = "".join(f"{_COMMAND}{kind}\n" for kind in sorted(kinds) if kind)
    file.write(f"{_HOLDER}{os.getpid()} on {platform.node()}\n{lines}")
    file.flush()
