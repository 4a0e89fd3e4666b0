"""The sizes that the pages of a parquet column declare, read from their headers before a page is unpacked.

A column's metadata count a dictionary once, however often its entries are repeated, and a page may declare another size
than the metadata do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MAX_HEADER = 2**16
"""Bytes of a page header; headers hold statistics, which writers cut off."""
_MAX_DEPTH = 8
_DICTIONARY_PAGE = 2
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY = range(1, 9)
_STRUCT = 12


@dataclass(frozen=True)
class PageSizes:
    """What reading a column chunk takes, at most.

    Attributes:
        stored: Bytes of all pages, uncompressed.
        dictionary: Bytes of the dictionary among them.
        values: Number of values in the data pages.
    """

    stored: int
    dictionary: int
    values: int

    @property
    def expanded(self) -> int:
        """Bytes of all values, if each was the whole dictionary."""
        return self.stored + self.dictionary * self.values


def page_sizes(read: Callable[[int, int], bytes], begin: int, length: int) -> PageSizes:
    """Walk over the page headers of a column chunk.

    Args:
        read: (offset, size) -> up to ``size`` bytes of the file.
        begin: Offset of the chunk's first page.
        length: Bytes of the chunk.

    Raises:
        ValueError: A header is damaged, or leads out of the chunk.
    """
    stored = dictionary = values = 0
    at, end = begin, begin + length
    while at < end:
        header, used = _struct(read(at, min(_MAX_HEADER, end - at)), 0, 0)
        unpacked, packed = header.get(2), header.get(3)
        if not isinstance(unpacked, int) or not isinstance(packed, int) or unpacked < 0 or packed < 0:
            raise ValueError("a damaged page header")
        stored += unpacked
        if header.get(1) == _DICTIONARY_PAGE:
            dictionary += unpacked
        else:
            about = header.get(5) or header.get(8) or {}
            count = about.get(1, 0) if isinstance(about, dict) else 0
            values += count if isinstance(count, int) and count > 0 else 0
        at += used + packed
    return PageSizes(stored, dictionary, values)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        if at >= len(data):
            raise ValueError("a page header that ends too early")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a damaged number in a page header")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """A structure of Thrift's compact protocol as field number -> value, and the offset after it."""
    if depth > _MAX_DEPTH:
        raise ValueError("a page header that is nested too deeply")
    values: dict[int, Any] = {}
    number = 0
    while True:
        if at >= len(data):
            raise ValueError("a page header that ends too early")
        head = data[at]
        at += 1
        if head == 0:
            return values, at
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        values[number], at = _value(data, at, head & 15, depth)


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind in (_I16, _I32, _I64):
        return _integer(data, at)
    if kind == _BYTE:
        return None, at + 1
    if kind == _DOUBLE:
        return None, at + 8
    if kind == _BINARY:
        size, at = _varint(data, at)
        return None, at + size
    if kind == _STRUCT:
        return _struct(data, at, depth + 1)
    raise ValueError("a page header with an unknown field")
