"""Reading JSON files of a million records one record at a time.

Each record comes with its byte range, so that it can be read again without keeping the file in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from localign.errors import UserError, did_you_mean
from localign.text.printing import printable
from localign.text.reading import LFS_POINTER, is_lfs_pointer, open_regular

_BLOCK = 2**23
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
# Where a record is cut off at the end of a block, the decoder reports an error within this many characters of the
# end, or an unterminated string.
_TRUNCATED_WITHIN = 16


class Span(NamedTuple):
    """One record of a file."""

    number: int
    """Position in the file, from 1."""
    begin: int
    """Offset of the record's first byte."""
    end: int
    """Offset of the byte after the record."""
    value: Any
    """The decoded JSON value."""


def scan(path: Path, digest: blake2b | None = None) -> Iterator[Span]:
    """Yield the records of a JSON list or a JSON-lines file, in order.

    Args:
        path: A UTF-8 file.
        digest: Updated with the file's bytes.

    Raises:
        UserError: The file is missing, empty or not JSON; raised on reaching the faulty record.
    """
    if not os.path.lexists(path):
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"there is no file {printable(path)}{did_you_mean(path.name, names)}")
    with open_regular(path) as file:
        yield from _Scanner(path, file, digest).records()


def _not_records(path: Path, text: str) -> str:
    """What a file is that begins neither with a list nor with an object."""
    name = printable(path)
    if text.startswith(("\xff\xfe", "\xfe\xff")):
        return f"{name} is UTF-16; save it as UTF-8"
    if is_lfs_pointer(text.encode("latin-1")):
        return f"{name} is {LFS_POINTER}"
    return f"{name} is neither a JSON list of records nor JSON lines"


class _Scanner:
    """A window on the file, decoded as Latin-1 so that one character is one byte; JSON's syntax is ASCII."""

    def __init__(self, path: Path, file: BinaryIO, digest: blake2b | None) -> None:
        self.path, self.file, self.digest = path, file, digest
        self.text, self.at, self.offset, self.ended = "", 0, 0, False
        self.number = 0
        self.decode = json.JSONDecoder().raw_decode

    def records(self) -> Iterator[Span]:
        self._read()
        mark = _BYTE_ORDER_MARK.decode("latin-1")
        self.at = len(mark) if self.text.startswith(mark) else 0
        first = self._next()
        if first not in "[{" or not first:
            raise UserError(_not_records(self.path, self.text))
        if first == "{":
            while self._next():
                yield self._record()
            return
        self.at += 1
        more = self._next() != "]"
        if not more:
            self.at += 1
        while more:
            self._next()
            yield self._record()
            separator = self._next()
            if separator not in ",]" or not separator:
                raise self._error("a comma or the end of the list is missing after it")
            self.at += 1
            more = separator == ","
        if self._next():
            raise self._error("there is text after the end of the list")

    def _record(self) -> Span:
        self.number += 1
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                break
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self.text) - _TRUNCATED_WITHIN
                if self.ended or not (near_end or error.msg.startswith("Unterminated string")):
                    raise self._error(
                        f"not valid JSON: {error.msg} (byte {self.offset + error.pos})"
                    ) from None
                self._read()
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
                raise self._error(f"not valid JSON: {error}") from None
        raw = self.text[self.at : end]
        if not raw.isascii():
            try:
                value = json.loads(raw.encode("latin-1"))
            except UnicodeDecodeError:
                raise self._error("not UTF-8 text") from None
        span = Span(self.number, self.offset + self.at, self.offset + end, value)
        self.at = end
        return span

    def _next(self) -> str:
        """Skip white space and peek at the next character; empty at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self._read()

    def _read(self) -> None:
        # A record longer than the window is decoded again for every block, so blocks grow with the window.
        block = self.file.read(max(_BLOCK, len(self.text) - self.at))
        if self.digest is not None:
            self.digest.update(block)
        self.ended = not block
        self.offset += self.at
        self.text = self.text[self.at :] + block.decode("latin-1")
        self.at = 0

    def _error(self, reason: str) -> UserError:
        return UserError(f"{printable(self.path)}, record {self.number}: {reason}")
