"""Reads text files that somebody else wrote: JSON, YAML, lists. Every problem is one line that names the file.

A byte order mark at the start is dropped. Size and depth are bounded before anything is parsed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from localign.errors import UserError
from localign.text.plainyaml import load_options, load_yaml
from localign.text.printing import printable

MAX_BYTES = 2**30
"""The largest text file that is read as a whole. Official question files have up to 300 MB."""
_GIT_LFS = b"version https://git-lfs"
_PACKED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7-Zip",
}  # fmt: skip
LFS_POINTER = "a Git LFS pointer, not the file itself; run `git lfs pull`"
"""What :func:`is_lfs_pointer` finds, as the end of "x is ..."."""


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file's content is only the pointer that Git LFS leaves in its place."""
    return content.startswith(_GIT_LFS)


def packed_with(content: bytes) -> str | None:
    """The program that packed a file, by its first bytes; None if none did."""
    return next((name for start, name in _PACKED.items() if content.startswith(start)), None)


@contextmanager
def open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; anything else is refused without waiting for it.

    Args:
        path: The file.

    Raises:
        UserError: The file is missing, is not a regular file, or cannot be read.
    """
    shown = printable(path)
    try:
        # A FIFO without a writer would block forever in open().
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{shown} is a folder or a special file, not a regular file")
            yield file
    except FileNotFoundError:
        raise UserError(f"there is no file {shown}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown} cannot be read: {printable(reason)}") from None


def read_bytes(path: str | Path, *, limit: int = MAX_BYTES) -> bytes:
    """Read a regular file.

    Args:
        path: The file.
        limit: The largest size that is read, in bytes.

    Raises:
        UserError: The file is missing, is not a regular file, is larger than ``limit``, cannot be read, or is a Git LFS
            pointer.
    """
    shown = printable(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UserError(f"{shown} has {size:,} bytes; at most {limit:,} are read")
        content = file.read(limit + 1)
    if is_lfs_pointer(content):
        raise UserError(f"{shown} is {LFS_POINTER}")
    return content


def read_text(path: str | Path, *, limit: int = MAX_BYTES, errors: str = "strict") -> str:
    """Read a UTF-8 file; a byte order mark is dropped.

    Args:
        path: The file.
        limit: The largest size that is read, in bytes.
        errors: ``"surrogateescape"`` keeps the bytes of file names that are not UTF-8.

    Raises:
        UserError: As for :func:`read_bytes`, or the file is not UTF-8.
    """
    content = read_bytes(path, limit=limit)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{printable(path)} is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig", errors=errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(path)} cannot be read: it is not UTF-8 (byte {error.start:,})") from None


def parse_json(
    text: str,
    where: object,
    compact: Callable[[dict[str, Any]], Any] | None = None,
    *,
    unique_keys: bool = False,
) -> Any:
    """Parse JSON.

    Args:
        text: JSON.
        where: Names the text in an error, such as its file.
        compact: Called with every object as soon as it is parsed, innermost first; its result replaces the object.
            This keeps the memory for large files small.
        unique_keys: Refuse an object that has a key twice, of which JSON would keep the last. For files that people
            write by hand.

    Raises:
        UserError: The text is not JSON or is nested too deeply.
    """
    try:
        return json.loads(text, object_hook=compact, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise UserError(f"{printable(where)} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{printable(where)} is not valid JSON: {printable(error)}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.60} occurs twice")
    return found


def read_json(
    path: str | Path,
    *,
    limit: int = MAX_BYTES,
    compact: Callable[[dict[str, Any]], Any] | None = None,
    unique_keys: bool = False,
) -> Any:
    """Read a JSON file.

    Raises:
        UserError: As for :func:`read_text` and :func:`parse_json`.
    """
    return parse_json(read_text(path, limit=limit), path, compact, unique_keys=unique_keys)


def read_json_object(path: str | Path, *, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds one object, in which no key occurs twice.

    Raises:
        UserError: As for :func:`read_json`, or the file holds something else.
    """
    content = read_json(path, limit=limit, unique_keys=True)
    if not isinstance(content, dict):
        raise UserError(f"{printable(path)} holds {type(content).__name__} instead of a JSON object")
    return content


def parsed_lines(text: str, where: object) -> Iterator[tuple[int, Any]]:
    """Yield the line number, from 1, and the value of each line of JSON; empty lines are skipped.

    Args:
        text: The lines.
        where: Names the text in an error, such as its file.

    Raises:
        UserError: A line is not JSON; the error names the line.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, f"{where}, line {number},")


def json_lines(path: str | Path, *, limit: int = MAX_BYTES) -> Iterator[tuple[int, Any]]:
    """Yield the line number, from 1, and the value of each line of a JSON-lines file; empty lines are skipped.

    Raises:
        UserError: As for :func:`read_text`, or a line is not JSON; the error names the line.
    """
    yield from parsed_lines(read_text(path, limit=limit), path)


def read_yaml(path: str | Path, *, options: bool = False) -> Any:
    """Read a YAML file of plain values.

    Args:
        path: The file.
        options: Read ``1e-3`` as a number, as in files of options.

    Raises:
        UserError: As for :func:`read_text`, or the file is not YAML, holds other than plain values, or is too large.
    """
    try:
        return (load_options if options else load_yaml)(read_text(path))
    except ValueError as error:
        raise UserError(f"{printable(path)} is not readable YAML: {printable(error)}") from None
