"""A lock that lets only one process write to a run folder."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TextIO

from localign.errors import UserError

LOCK_FILE = ".lock"
PATIENCE = 5.0
"""Seconds to wait for a process that was just killed to release the lock."""


def lock(folder: Path) -> TextIO | None:
    """Lock a folder until the returned file is closed or this process ends.

    The ranks of a killed launcher may still be running and writing. The lock stops a resumed run from writing to the
    same log and checkpoints.

    Returns:
        The open lock file; None if the system or the file system does not support locks.

    Raises:
        UserError: Another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            # lockf: forked loader workers do not inherit the lock.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise UserError(
                f"another process is writing to {folder} ({holder}); end that process first"
            ) from None
        except OSError:
            file.close()
            return None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        return file
