"""Atomic writes: a file or folder is complete or absent, also after a crash."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_LEFTOVER = re.compile(r"\..+\.\d+\.tmp", re.DOTALL)
"""Names of temporary files and folders."""


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
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


def temporary_name(path: Path) -> Path:
    """The file or folder to fill before it takes the place of ``path``; :func:`sweep` finds it after a kill."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sweep(*folders: Path, name: str | None = None) -> None:
    """Delete the temporary files and folders that killed processes left in folders; the caller holds their lock.

    Args:
        folders: The folders.
        name: Delete only those of this file or folder.
    """
    start = "." if name is None else f".{name}."
    for path in [path for folder in folders if folder.is_dir() for path in folder.iterdir()]:
        if path.name.startswith(start) and _LEFTOVER.fullmatch(path.name):
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path, ignore_errors=True) if is_folder else path.unlink(missing_ok=True)


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
    temporary = temporary_name(path)
    try:
        yield temporary
        readable(temporary)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file through :func:`replacing`. Bytes of file names that are not UTF-8 are escaped."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill. At the end its files are flushed to disk and it is renamed to ``path``.

    An existing ``path`` is deleted just before the rename. Callers that must never lose the old folder should write to
    a new name.
    """
    path = Path(path)
    with _temporary_folder(path) as temporary:
        yield temporary
        put_in_place(temporary, path)


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``; whatever is in it at the end is deleted."""
    temporary = temporary_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
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


@contextmanager
def refilling_folder(path: str | Path, own: Sequence[str], last: str) -> Iterator[Path]:
    """Yield a temporary folder to fill. At the end its files take their places in ``path``.

    A new folder appears as a whole. In an existing one, files of others stay; files that match ``own`` and were not
    written are deleted.

    Args:
        path: The folder.
        own: Patterns of names.
        last: A file without which the folder is incomplete; it is removed first and moved last.
    """
    path = Path(path)
    with _temporary_folder(path) as temporary:
        yield temporary
        if not path.exists():
            put_in_place(temporary, path)
            return
        new = sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name))
        for file in new:
            readable(file)
            fsync_path(file)
        (path / last).unlink(missing_ok=True)
        for file in [file for pattern in own for file in path.glob(pattern)]:
            if not (temporary / file.name).exists():
                file.unlink(missing_ok=True)
        for file in new:
            os.replace(file, path / file.name)
        fsync_path(path)
