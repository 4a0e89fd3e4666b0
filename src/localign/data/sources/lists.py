"""Reads lists of images: a path per line, a table with or without a heading, or an object per line.

A first row that names no file is a heading if it looks like one, and an error if it does not.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from localign.data.sources.base import SUFFIXES
from localign.errors import UserError, did_you_mean
from localign.text.printing import printable
from localign.text.reading import read_bytes

LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")
PATH_HEADERS = (
    "path", "filepath", "file_path", "image_path", "img_path", "imagepath", "file", "filename", "file_name",
    "image_file", "image_filename", "image_name", "img_name", "image", "img", "images", "image_id", "name",
)  # fmt: skip
"""Headings of the column of paths, the surest first."""
LABEL_HEADERS = (
    "label",
    "class",
    "category",
    "target",
    "class_name",
    "classname",
    "label_name",
    "class_id",
    "label_id",
)
"""Headings of the column of labels."""
SHARD_HEADERS = ("shard", "__url__")
"""Headings of the column of shards, in lists of images to leave out."""

_SEPARATORS = ",\t;|"
_SAMPLE = 20
_NO_LABEL = frozenset({"", "nan", "null", "<na>"})
"""What programs write for a missing label, in lower case."""


@dataclass(frozen=True)
class ImageList:
    """The content of a list, in its order; repetitions are kept."""

    names: list[str]
    """Paths as they are written, or names of images."""
    labels: list[str] | None
    """The label of each image, "" where it has none; None if the list has no labels."""
    shards: list[str] | None
    """The shard of each image, "" where none is given; None if the list names no shards."""
    odd_label: str = ""
    """Says which label is not a word or a number; "" if all are."""


class _Layout(NamedTuple):
    """Where a table has its columns."""

    path: int
    label: int | None
    shard: int | None
    headed: bool


def read_list(path: Path, root: Path | None = None) -> ImageList:
    """Read a .txt, .csv, .tsv or .jsonl list. Blank lines and lines that begin with ``#`` are skipped.

    Args:
        path: The list.
        root: The folder that paths are relative to. It tells a heading from an image. None: the list names images of
            some source.

    Raises:
        UserError: The list is missing or not UTF-8 text, its first row names no file and is no heading, or a row names
            no image.
    """
    kind = path.suffix.lower()
    text = _text(path)
    if kind == ".jsonl":
        return _objects(path, text)
    if kind == ".txt":
        return ImageList(_lines(path, text, root), None, None)
    try:
        return _table(path, text, root)
    except csv.Error as error:
        raise UserError(
            f"{printable(path)} is not a list of image paths, one per line: {printable(error)}"
        ) from None


def _text(path: Path) -> str:
    """The content as text. Paths in a .txt file may be any bytes, as file names are."""
    if not path.exists():
        raise UserError(f"there is no file {printable(path)}{_sibling_hint(path)}")
    content = read_bytes(path)
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    errors = "surrogateescape" if path.suffix.lower() == ".txt" and b"\0" not in content else "strict"
    try:
        if wide:
            raise ValueError
        return content.decode("utf-8-sig", errors)
    except ValueError:
        saved = "; it is UTF-16, save it as UTF-8" if wide else ""
        raise UserError(
            f"{printable(path)} is not a UTF-8 list of image paths, one per line{saved}"
        ) from None


def _sibling_hint(path: Path) -> str:
    try:
        return did_you_mean(path.name, os.listdir(path.parent))
    except OSError:
        return ""


def _lines(path: Path, text: str, root: Path | None) -> list[str]:
    lines = [line.strip() for line in io.StringIO(text, newline=None)]
    names = [line for line in lines if line and not line.startswith("#")]
    if names and not _names_image(names[0], root):
        if _header(names[0]) in PATH_HEADERS:
            return names[1:]
        if root is not None:
            raise UserError(_no_heading(path, names[0]) + _labels_hint(names[0], root))
    return names


def _labels_hint(line: str, root: Path) -> str:
    before = line.rpartition("\t" if "\t" in line else " ")[0].strip()
    return "; a line of a .txt list is a path, labels need a .csv list" if _is_file(root, before) else ""


def _names_image(cell: str, root: Path | None) -> bool:
    """Whether a cell of the first row is an image rather than a heading."""
    return _has_image_suffix(cell) or (root is not None and _is_file(root, cell))


def _is_file(root: Path, name: str) -> bool:
    return bool(name) and os.path.isfile(os.path.join(root, name))


def _no_heading(path: Path, cell: str) -> str:
    return (
        f"the first row of {printable(path)} names no file: {printable(repr(cell))}; begin with an image, or with a "
        "heading such as path,label"
    )


def _header(cell: str) -> str:
    return cell.strip().casefold().replace(" ", "_").replace("-", "_")


def _table(path: Path, text: str, root: Path | None) -> ImageList:
    separator, layout = _separator_and_layout(path, text, root)
    rows = _rows(text, separator)
    if layout.headed:
        next(rows)
    names: list[str] = []
    labels: list[str] | None = None if layout.label is None else []
    shards: list[str] | None = None if layout.shard is None else []
    for line, cells in rows:
        name = _cell(cells, layout.path)
        if not name:
            raise UserError(f"{printable(path)}, line {line}, names no image")
        names.append(name)
        if labels is not None:
            label = _cell(cells, layout.label)
            labels.append("" if label.casefold() in _NO_LABEL else label)
        if shards is not None:
            shards.append(_cell(cells, layout.shard))
    return ImageList(names, labels, shards)


def _rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line, stripped cells) of each row that is neither blank nor a comment."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != "\t"
    )
    for row in reader:
        cells = [cell.strip() for cell in row]
        if any(cells) and not cells[0].startswith("#"):
            yield reader.line_num, cells


def _cell(cells: Sequence[str], column: int | None) -> str:
    return cells[column] if column is not None and column < len(cells) else ""


def _separator_and_layout(path: Path, text: str, root: Path | None) -> tuple[str, _Layout]:
    """The first separator that makes sense of the first rows."""
    separators = "\t" if path.suffix.lower() == ".tsv" else _SEPARATORS
    first: list[str] | None = None
    for separator in separators:
        sample = [cells for _, cells in itertools.islice(_rows(text, separator), _SAMPLE)]
        if sample and (layout := _layout(sample, root)) is not None:
            return separator, layout
        first = first or (sample[0] if sample else None)
    if first is not None and root is not None:
        raise UserError(_no_heading(path, first[0]))
    return separators[0], _Layout(0, 1 if first is not None and len(first) > 1 else None, None, headed=False)


def _layout(sample: list[list[str]], root: Path | None) -> _Layout | None:
    """The layout of a table by its first rows; None if they name no file and have no heading."""
    first, rest = sample[0], sample[1:]
    if _names_image(first[0], root):
        return _Layout(0, 1 if len(first) > 1 else None, None, headed=False)
    if any(_has_image_suffix(cell) for cell in first):
        return None
    headers = [_header(cell) for cell in first]
    known = [headers.index(name) for name in PATH_HEADERS if name in headers]
    existing = [] if root is None else [
        column for column in range(len(first)) if any(_is_file(root, _cell(cells, column)) for cells in rest)
    ]  # fmt: skip
    images = [column for column in existing if any(_has_image_suffix(_cell(cells, column)) for cells in rest)]
    paths = [column for column in known if column in existing] or known or images
    if not paths:
        return None
    return _Layout(paths[0], _column(headers, LABEL_HEADERS), _column(headers, SHARD_HEADERS), headed=True)


def _has_image_suffix(cell: str) -> bool:
    return os.path.splitext(cell)[1].lower() in SUFFIXES


def _column(headers: list[str], names: Sequence[str]) -> int | None:
    return next((headers.index(name) for name in names if name in headers), None)


def _objects(path: Path, text: str) -> ImageList:
    names, labels, shards, odd = [], [], [], ""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        content = _parse_object(line, f"{printable(path)}, line {number},")
        name = next((content[key] for key in PATH_HEADERS if content.get(key) is not None), None)
        if not isinstance(name, str) or not name:
            raise UserError(
                f"{printable(path)}, line {number}, names no image; write objects such as "
                '{"path": "x.jpg", "label": "cat"}'
            )
        label = next((content[key] for key in LABEL_HEADERS if key in content), None)
        shard = next((content[key] for key in SHARD_HEADERS if isinstance(content.get(key), str)), "")
        if isinstance(label, list | dict):
            odd = (
                odd or f"line {number}: its label is a {'list' if isinstance(label, list) else 'JSON object'}"
            )
        names.append(name)
        labels.append(label_text(label))
        shards.append(shard)
    return ImageList(names, labels if any(labels) or odd else None, shards if any(shards) else None, odd)


def _parse_object(line: str, where: str) -> dict[str, Any]:
    """A JSON object with its keys as :func:`_header` writes them."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a JSON object")
    headed: dict[str, Any] = {}
    for key, value in content.items():
        headed.setdefault(_header(key), value)
    return headed


def label_text(value: Any) -> str:
    """A label as the name of its class; "" if it is missing, not a number, or not a single value."""
    if value is None or isinstance(value, list | dict | tuple):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    text = str(value)
    return text if text.strip() else ""
