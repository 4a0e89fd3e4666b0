"""Bounds on image files, checked before a decoder takes memory or time. An environment variable raises each."""

from __future__ import annotations

import os
import re

from localign.errors import UserError

PIXELS_VARIABLE = "LOCALIGN_MAX_PIXELS"
BYTES_VARIABLE = "LOCALIGN_MAX_IMAGE_BYTES"
SCANS_VARIABLE = "LOCALIGN_MAX_JPEG_SCANS"
TEXT_VARIABLE = "LOCALIGN_MAX_PNG_TEXT"
PARTS_VARIABLE = "LOCALIGN_MAX_IMAGE_PARTS"

_START_OF_SCAN = b"\xff\xda"
_END_OF_IMAGE = 0xD9
_WITHOUT_LENGTH = frozenset({0x01, 0xD8, *range(0xD0, 0xD8)})
# After the header of a scan, FF 00 is data and FF D0 to FF D7 restart the decoder; FF FF is filling.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def bound(variable: str, default: int) -> int:
    """A bound: the value of an environment variable, or the default.

    Raises:
        UserError: The value is not a whole number above 0.
    """
    value = os.environ.get(variable)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and int(value[:20]) > 0):
        raise UserError(f"the environment variable {variable} must be a whole number above 0, not {value!r}")
    return int(value[:20])


def jpeg_scans(data: bytes, enough: int) -> int:
    """The number of scans in a JPEG file. Each scan of a progressive file runs over the whole image again.

    Args:
        data: The file.
        enough: Files with at most this many marks of a scan are not looked at closely: the result may then be too
            large, because previews and colour profiles may hold such marks, but not larger than ``enough``.
    """
    marks = data.count(_START_OF_SCAN)
    if marks <= enough:
        return marks
    scans, at = 0, 0
    while (found := _NEXT_MARKER.search(data, at)) is not None:
        marker, at = data[found.end() - 1], found.end()
        if marker == _END_OF_IMAGE:
            break
        if marker in _WITHOUT_LENGTH:
            continue
        scans += marker == _START_OF_SCAN[1]
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return scans


def has_more_parts(data: bytes, limit: int) -> bool:
    """Whether a PNG has more than ``limit`` chunks besides its pixels', or a JPEG more segments before its pixels."""
    if data.startswith(b"\x89PNG"):
        at, parts = 8, 0
        while at + 8 <= len(data) and parts <= limit:
            kind = data[at + 4 : at + 8]
            if kind == b"IEND":  # decoders read nothing behind it
                break
            parts += kind not in (b"IDAT", b"fdAT")
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        return parts > limit
    at, parts = 2, 0
    is_jpeg = data.startswith(b"\xff\xd8")
    while is_jpeg and parts <= limit and data[at : at + 1] == b"\xff" and data[at : at + 2] != _START_OF_SCAN:
        parts += 1
        bare = at + 1 < len(data) and (data[at + 1] in _WITHOUT_LENGTH or data[at + 1] == 0xFF)
        at += 2 if bare else 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return parts > limit
