"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def readable(file: Path) -> None:
    """Give a file the permissions that new files have here; safetensors makes them for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write to the yielded temporary file; at the end it is flushed and takes the place of ``path``."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        readable(temporary)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file through :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Fill the yielded temporary folder; at the end its files are flushed and it is renamed to ``path``.

    An existing ``path`` is replaced; while that happens there is a moment in which neither is there under
    its final name, so callers that must never lose the old folder write to a new name.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """The end of :func:`replacing_folder`: flush a folder's files and rename it to ``path``, which it replaces."""
    for file in temporary.rglob("*"):
        if file.is_file():
            readable(file)
        fsync_path(file)
    fsync_path(temporary)
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
    fsync_path(path.parent)
