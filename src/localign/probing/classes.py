"""Class tables: the meaning of pixel values in label maps. The tables of COCO-Stuff and ADE20k."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localign.errors import UserError
from localign.text.printing import printable
from localign.text.reading import read_json, read_text

KINDS = ("thing", "stuff", "other")
"""Kinds of classes: an object with a shape, amorphous matter, or neither (such as "unlabeled")."""

COCO_STUFF_THINGS = 91
"""The last thing among COCO-Stuff's 183 classes: 1 to 91 are things, 92 to 182 are stuff."""

IGNORED = 255
"""The value of pixels to ignore, unless it is a class or another value is given."""

LARGEST_ID = 65_535
"""Largest class id. Label maps are images of at most 16 bits."""


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Classes, and the class of each pixel value."""

    names: tuple[str, ...]
    """By class id; class 0 is "unlabeled"."""
    ids: NDArray[np.int32]
    """The class id of every pixel value; -1 for values that no pixel may have."""
    kinds: tuple[str, ...] | None = None
    """One of ``KINDS`` by class id; None if unknown."""
    values: str = ""
    """The allowed pixel values in words, for error lines."""
    ignore: int | None = None
    """The value of pixels that belong to no class and count nowhere."""

    def ignoring(self, value: int | None) -> ClassTable:
        """The table with another value of pixels to ignore, even if that value has a class.

        Raises:
            UserError: No pixel can have the value.
        """
        if value is not None and not 0 <= value <= LARGEST_ID:
            raise UserError(f"the value to ignore must lie within 0..{LARGEST_ID}, not {value}")
        return replace(self, ignore=value)

    @cached_property
    def _codes(self) -> NDArray[np.int32]:
        """The class id of every pixel value, and the number of classes for the value to ignore."""
        if self.ignore is None:
            return self.ids
        codes = np.full(max(len(self.ids), self.ignore + 1), -1, dtype=np.int32)
        codes[: len(self.ids)] = self.ids
        codes[self.ignore] = len(self.names)
        return codes

    def classes_of(self, values: NDArray[Any]) -> NDArray[Any]:
        """The class ids of pixel values, and the number of classes for pixels to ignore.

        Returns:
            uint8 if that allows all ids, else int32.

        Raises:
            ValueError: Values without a class; the error's only argument is a list of the first five.
        """
        known = len(self._codes)
        if int(values.min()) >= 0 and int(values.max()) < known:
            ids: NDArray[Any] = self._codes[values]
            if int(ids.min()) >= 0:
                return ids.astype(np.uint8) if len(self.names) + (self.ignore is not None) <= 256 else ids
        found = np.unique(values).tolist()
        raise ValueError([v for v in found if not (0 <= v < known and self._codes[v] >= 0)][:5])


def _with_default(table: ClassTable) -> ClassTable:
    """The table, ignoring ``IGNORED`` unless that value is a class."""
    has_class = len(table.ids) > IGNORED and table.ids[IGNORED] >= 0
    return table if has_class else replace(table, ignore=IGNORED)


def class_table(classes: str | Path | Mapping[Any, Any] | Sequence[Any]) -> ClassTable:
    """The table for label maps that hold class ids.

    Args:
        classes: A JSON file or a mapping from id to class, or a list of classes in the order of their ids. A class is
            its name, or ``{"name": ..., "kind": "thing" | "stuff" | "other"}``. Ids may have gaps: no pixel may have
            an id in a gap. If any class has a kind, classes without a kind are "other". The key ``"ignore"`` of a
            mapping gives the value of pixels to ignore, null for none; default 255 if that is not a class.

    Raises:
        UserError: The file cannot be read, an id is not a number or out of range, or a kind is unknown.
    """
    entries: Any = classes
    description = "the class table"
    if isinstance(classes, (str, Path)):
        description = f"the class table {printable(classes)}"
        entries = _read_entries(classes)
    try:
        pairs = dict(entries.items() if isinstance(entries, Mapping) else enumerate(entries))
        has_ignore, ignore = "ignore" in pairs, pairs.pop("ignore", None)
        if ignore is not None and type(ignore) is not int:
            raise ValueError(f"the value to ignore is a number or null, not {json.dumps(ignore):.60}")
        table = {int(key): _name_and_kind(entry) for key, entry in pairs.items()}
    except (ValueError, TypeError) as error:
        raise UserError(f"{description} needs ids and names: {error}") from None
    if not table or min(table) < 0 or max(table) > LARGEST_ID:
        raise UserError(f"{description} needs at least one id, and all ids within 0..{LARGEST_ID}")
    size = max(table) + 1
    kinds = tuple(table.get(i, ("", ""))[1] for i in range(size))
    read = ClassTable(
        names=tuple(table[i][0] if i in table else f"(no class {i})" for i in range(size)),
        ids=np.array([i if i in table else -1 for i in range(size)], dtype=np.int32),
        kinds=tuple(kind or "other" for kind in kinds) if any(kinds) else None,
    )
    return read.ignoring(ignore) if has_ignore else _with_default(read)


def _read_entries(path: str | Path) -> Any:
    if not Path(path).exists():
        raise UserError(f"cannot read the class table {printable(path)}: No such file or directory")
    try:
        entries = read_json(path, unique_keys=True)
    except UserError as error:
        raise UserError(f"cannot read the class table: {error}") from None
    if not isinstance(entries, dict | list):
        raise UserError(
            f"the class table {printable(path)} is neither a mapping from ids to names nor a list"
        )
    named = entries if isinstance(entries, dict) else {}
    keys = [int(key) for key in named if len(key) < 20 and key.strip().isdecimal()]
    if len(set(keys)) < len(keys):
        raise UserError(f"the class table {printable(path)} has an id twice, such as 1 and 01")
    return entries


def _name_and_kind(entry: Any) -> tuple[str, str]:
    """An entry's name and its kind, "" if unknown."""
    if isinstance(entry, str | int | float) and not isinstance(entry, bool):
        return str(entry), ""
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"a class is its name, or an object with a name and a kind, not {json.dumps(entry):.60}"
        )
    if unknown := sorted(entry.keys() - {"name", "kind"}):
        raise ValueError(f"a class has a name and a kind, not {unknown[0]!r:.60}")
    if "name" not in entry or entry.get("kind", "other") not in KINDS:
        raise ValueError(f"{json.dumps(entry):.200} has no name, or a kind other than {', '.join(KINDS)}")
    return str(entry["name"]), str(entry.get("kind", ""))


def coco_stuff(*, things_only: bool = False) -> ClassTable:
    """COCO-Stuff's classes: 0 unlabeled, 1 to 91 things, 92 to 182 stuff.

    A pixel's value is its class minus one, and 255 for unlabeled. Eleven things, such as 12 "street sign", were never
    annotated: no pixel has these classes.

    Args:
        things_only: Leave only unlabeled and the things, 92 classes; stuff becomes unlabeled.
    """
    names, kinds = _shipped("coco-stuff")
    ids = np.full(256, -1, dtype=np.int32)
    ids[: len(names) - 1] = np.arange(1, len(names))
    ids[255] = 0
    if things_only:
        ids[ids > COCO_STUFF_THINGS] = 0
        names, kinds = names[: COCO_STUFF_THINGS + 1], kinds[: COCO_STUFF_THINGS + 1]
    return ClassTable(names, ids, kinds, "the values 0..181, the class minus one, and 255, unlabeled")


def ade20k(info: Path | None = None) -> ClassTable:
    """The classes of ADE20k's scene parsing benchmark: 0 other, 1 to 150.

    Args:
        info: The data set's ``objectInfo150.txt``, from which each class takes its first name. Without it, names and
            kinds come from the package.

    Raises:
        UserError: The file is not such a table.
    """
    names, kinds = _shipped("ade20k")
    found = names if info is None else (names[0], *_object_info(info, len(names) - 1))
    ids = np.full(256, -1, dtype=np.int32)
    ids[: len(names)] = np.arange(len(names))
    words = f"the values 0..{len(names) - 1}"
    return _with_default(ClassTable(found, ids, kinds if found == names else None, words))


def _object_info(path: Path, count: int) -> list[str]:
    """The first name of each class, in the order of the ids."""
    lines = read_text(path).splitlines()
    rows = [line.split("\t") for line in lines[1:] if line.strip()]
    if [row[0].strip() for row in rows] != [str(i) for i in range(1, count + 1)]:
        raise UserError(f"{path} is not a table of {count} classes: a heading, then tab-separated rows by id")
    return [row[-1].split(",")[0].strip() for row in rows]


def _shipped(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and kinds by class id, from a table inside the package."""
    table = Path(str(files("localign"))) / "assets" / "classes" / f"{name}.tsv"
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()]
    return tuple(row[1] for row in rows), tuple(row[0] for row in rows)
