"""Readers for the official files of benchmarks. Every problem is a UserError that names the file."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from PIL import Image

from localign.errors import UserError
from localign.text.printing import printable
from localign.text.reading import read_bytes

T = TypeVar("T")


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        UserError: The file is missing or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_json(path: Path, compact: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        compact: Called with every object as soon as it is parsed, innermost first; its result replaces the object.
            This keeps the memory for large files small.

    Raises:
        UserError: The file is missing or not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_hook=compact)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_json_lines(path: Path) -> list[Any]:
    """Read a file with one JSON value per line; empty lines are skipped.

    Raises:
        UserError: The file is missing, or a line is not JSON.
    """
    values = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}, is not valid JSON: {error}") from None
    return values


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
        raise UserError(f"{where} is {type(record).__name__}, not an object with fields")
    value = record.get(name)
    if not isinstance(value, kind):
        problem = f"is {value!r:.60}, not {kind.__name__}" if name in record else "is missing"
        raise UserError(f"{where}: the field {name!r} {problem}")
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
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(c, int | float) for c in value):
        raise UserError(f"{where}: the field {name!r} is {value!r:.60}, not four numbers")
    x1, y1, x2, y2 = (float(c) for c in value)
    return x1, y1, x2, y2


def image_size(path: str) -> tuple[int, int]:
    """Width and height of an image as stored; only the beginning of the file is read.

    Raises:
        UserError: The file is not an image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise UserError(f"the size of the image {path} cannot be read: {error}") from None
