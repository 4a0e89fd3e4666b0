"""One writer per run folder."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TextIO

from localign.errors import UserError

LOCK_FILE = ".lock"
PATIENCE = 5.0
"""Seconds in which a process that was just killed may let go."""


def lock(folder: Path) -> TextIO | None:
    """Hold a run folder until the file is closed or this process ends, however it ends.

    A killed launcher may leave its ranks running; a run continued beside them would share its log and
    checkpoints with them.

    Returns:
        The open lock file; None where the system or the file system has no locks.

    Raises:
        UserError: Another process holds the folder.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            # Of this process alone: loader workers, which are forked, do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise UserError(f"another process is writing into {folder} ({holder}); end it first") from None
        except OSError:
            file.close()
            return None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        return file
