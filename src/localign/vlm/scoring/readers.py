"""Readers for the official files of benchmarks. Every problem is a UserError that names the file."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from localign.data.decoding import UnreadableImage, orientation_of, stored_size
from localign.data.decoding import read_bytes as read_image_bytes
from localign.errors import UserError
from localign.text.printing import printable
from localign.text.reading import parse_json, parsed_lines, read_bytes, read_text

T = TypeVar("T")


class _PlainUnpickler(pickle._Unpickler):
    """Reads numbers, strings and containers of them, and refuses pickles that name a class or function.

    It is the one in Python, whose memo is a dict. The one in C has an array as long as the largest index, which eight
    bytes make 2.5 GB.
    """

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain values (numbers, strings, lists, dicts) without executing anything.

    Strings that Python 2 wrote are decoded as UTF-8.

    Raises:
        UserError: The file is missing, damaged, or holds anything but plain values.
    """
    content = read_bytes(path)
    try:
        return _PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        cause = printable(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"{printable(path)} is not a pickle of plain values: {cause}") from None


def as_list(value: Any, where: object) -> list[Any]:
    """Check that a value is a list.

    Raises:
        UserError: It is not; the line names ``where``.
    """
    if not isinstance(value, list):
        raise UserError(f"{where} holds {type(value).__name__} instead of a list of records")
    return value


def field(record: Any, name: str, kind: type[T], where: object) -> T:
    """A field of a record, checked for its type.

    Raises:
        UserError: The record is not an object, lacks the field, or has a value of another type there; the line names
            ``where``.
    """
    if not isinstance(record, dict):
        raise UserError(f"{printable(where)} is {type(record).__name__}, not an object with fields")
    value = record.get(name)
    if not isinstance(value, kind):
        problem = f"is {value!r:.60}, not {kind.__name__}" if name in record else "is missing"
        raise UserError(f"{printable(where)}: the field {name!r} {problem}")
    return value


def strings(values: Sequence[Any], name: str, where: object) -> tuple[str, ...]:
    """Check that the values of a field are strings, at least one.

    Raises:
        UserError: They are not; the line names ``where``.
    """
    if not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: the field {name!r} is {values!r:.60}, not a list of strings")
    return tuple(values)


def four_numbers(value: Any, name: str, where: object) -> tuple[float, float, float, float]:
    """Check that the value of a field is a list of four numbers.

    Raises:
        UserError: It is not; the line names ``where``.
    """
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_finite, value)):
        raise UserError(f"{where}: the field {name!r} is {value!r:.60}, not four numbers")
    x1, y1, x2, y2 = (float(c) for c in value)
    return x1, y1, x2, y2


def _is_finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def zero_or_one(record: Any, name: str, where: object) -> int:
    """A field of a record that is 0 or 1, or false or true.

    Raises:
        UserError: It is something else; the line names ``where``.
    """
    value = field(record, name, int, where)
    if value not in (0, 1):
        raise UserError(f"{where}: the field {name!r} must be 0 or 1, not {value!r:.60}")
    return int(value)


def records_of(path: Path) -> list[Any]:
    """The records of a file: a JSON list, or JSON lines.

    Raises:
        UserError: The file is missing, or is neither.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        return as_list(parse_json(text, path), path)
    return [record for _, record in parsed_lines(text, path)]


class StoredImage(NamedTuple):
    """The frame of an image's pixels as the file stores them. Boxes of official files refer to it."""

    width: int
    height: int
    orientation: int
    """EXIF orientation, 1..8. Models see the image upright."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)

    def upright(self, corners: Sequence[float]) -> tuple[float, float, float, float]:
        """A box (left, top, right, bottom) of the stored pixels as a box of the upright image."""
        x1, y1, x2, y2 = corners
        if self.orientation in (2, 3, 7, 8):
            x1, x2 = self.width - x2, self.width - x1
        if self.orientation in (3, 4, 6, 7):
            y1, y2 = self.height - y2, self.height - y1
        return (y1, x1, y2, x2) if self.orientation >= 5 else (x1, y1, x2, y2)


def stored_image(path: str) -> StoredImage:
    """Size and orientation of an image; nothing is decoded.

    Raises:
        UserError: The file is not an image.
    """
    name = printable(path)
    try:
        data = read_image_bytes(path, name)
        _, width, height = stored_size(data, name)
        return StoredImage(width, height, orientation_of(data, name))
    except UnreadableImage as error:
        raise UserError(f"the size of the image {name} cannot be read: {error.reason}") from None
