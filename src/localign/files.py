"""Atomic writes: a file or folder is complete or absent, also after a crash."""

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
    """Give a file the default permissions of new files. safetensors creates files that only the owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def is_inside(path: str, folder: str) -> bool:
    """Whether a path lies in a folder.

    Links inside the folder may lead anywhere: the owner of the folder made them. But a path with ``..`` is judged by
    where it really leads.

    Args:
        path: Absolute, or relative to the folder.
        folder: The folder.
    """
    climbs = ".." in path.replace("\\", "/").split("/")
    if not climbs and not os.path.isabs(path):
        return True
    joined, real = os.path.join(folder, path), os.path.realpath(folder)
    if climbs:
        return _starts_with(os.path.realpath(joined), real)
    named = os.path.abspath(joined)
    return any(_starts_with(named, f) for f in (os.path.abspath(folder), real)) or _starts_with(
        os.path.realpath(joined), real
    )


def _starts_with(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file to write to. At the end it is flushed to disk and replaces ``path``."""
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
    """Yield a temporary folder to fill. At the end its files are flushed to disk and it is renamed to ``path``.

    An existing ``path`` is deleted just before the rename. Callers that must never lose the old folder should write to
    a new name.
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
    """Flush a folder's files to disk and rename it to ``path``, which it replaces."""
    for file in temporary.rglob("*"):
        if file.is_file():
            readable(file)
        fsync_path(file)
    fsync_path(temporary)
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
    fsync_path(path.parent)
