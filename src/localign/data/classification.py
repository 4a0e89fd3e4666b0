"""Labels of whole images: class folders, lists with a label column, scenes.

Labels lie beside a source, by index, and never travel through the loader: a batch's ``indices`` are enough to
look them up, also where an unreadable image was replaced by another.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from localign.data.scenes import SceneSource, pair_presence
from localign.data.sources import (
    ExcludingSource,
    FileListSource,
    FolderSource,
    ImageSource,
    ParquetSource,
    TarSource,
)
from localign.data.sources.files import LABEL_HEADERS, is_heading, list_rows
from localign.data.sources.parquet import labels_column
from localign.errors import UserError


class ImageLabels(Protocol):
    """What each image of a source shows."""

    classes: tuple[str, ...]
    """Names, sorted where they come from folders or lists."""
    multi_label: bool
    """An image may show any number of the classes, rather than exactly one."""

    def targets(self, indices: Tensor) -> Tensor:
        """Presence of each class: float32 ``(batch, classes)``, 0 or 1, of int64 ``(batch,)`` images."""

    def fingerprint(self) -> str:
        """A short hash of classes and labels."""


class ClassLabels:
    """One class per image.

    Args:
        classes: Names.
        codes: Integers ``(images,)``, the class of each image as a place in ``classes``.
    """

    multi_label = False

    def __init__(self, classes: Sequence[str], codes: NDArray[np.integer]) -> None:
        self.classes = tuple(classes)
        self.codes = codes.astype(np.int32)

    def targets(self, indices: Tensor) -> Tensor:
        codes = torch.from_numpy(self.codes[indices.numpy()]).long()
        return torch.nn.functional.one_hot(codes, len(self.classes)).float()

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(json.dumps(self.classes).encode(), digest_size=8)
        digest.update(self.codes.astype("<i4").tobytes())
        return digest.hexdigest()


class SceneLabels:
    """The shape-colour pairs that a scene shows, drawn when first asked for and then kept."""

    multi_label = True

    def __init__(self, source: SceneSource) -> None:
        self.classes = source.config.classes[1:]
        self._source = source
        self._presence = np.zeros((len(source), len(self.classes)), dtype=bool)
        self._known = np.zeros(len(source), dtype=bool)

    def targets(self, indices: Tensor) -> Tensor:
        wanted = indices.numpy()
        for index in wanted[~self._known[wanted]].tolist():
            self._presence[index] = pair_presence(self._source.config, self._source.load_labelled(index)[1])
            self._known[index] = True
        return torch.from_numpy(self._presence[wanted]).float()

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def labels_of(source: ImageSource, spec: str) -> ImageLabels:
    """The labels of an opened source.

    Args:
        source: Of class folders, also inside of tar shards, of a list or parquet files with a label column, or of
            scenes; or such a source without some of its images.
        spec: What it was opened by, for the error's line.

    Raises:
        UserError: It has no labels, labels for some images only, an empty class folder, or a single class.
    """
    if isinstance(source, SceneSource):
        return SceneLabels(source)
    labels = _class_labels(source, spec)
    if len(labels.classes) == 1:
        raise UserError(f"{spec} has a single class, {labels.classes[0]!r}; classification needs two")
    return labels


def _class_labels(source: ImageSource, spec: str) -> ClassLabels:
    if isinstance(source, FolderSource):
        return _folder_labels(source)
    if isinstance(source, TarSource):
        folders = sorted({source.name(i).partition("/")[0] for i in range(len(source))})
        return ClassLabels(folders, _first_folders(source, folders, spec))
    if isinstance(source, FileListSource):
        return _list_labels(source)
    if isinstance(source, ParquetSource) and (found := labels_column(source.files)) is not None:
        return ClassLabels(*found)
    if isinstance(source, ExcludingSource):
        labels = _class_labels(source.source, spec)
        return ClassLabels(labels.classes, labels.codes[source.kept])
    raise UserError(f"{spec} has no labels of whole images")


def _folder_labels(source: FolderSource) -> ClassLabels:
    """The first folder of each name is its class, as torchvision's ImageFolder has it."""
    root = source.root
    with os.scandir(root) as entries:
        folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not folders:
        raise UserError(f"{root} has no class folders: its images must lie in one folder per class")
    codes = _first_folders(source, folders, str(root))
    empty = np.flatnonzero(np.bincount(codes, minlength=len(folders)) == 0)
    if len(empty):
        more = f" (and {len(empty) - 1} others)" if len(empty) > 1 else ""
        raise UserError(f"the class folder {root / folders[empty[0]]}{more} holds no image")
    return ClassLabels(folders, codes)


def _first_folders(source: ImageSource, folders: Sequence[str], spec: str) -> NDArray[np.int32]:
    place = {name: number for number, name in enumerate(folders)}
    codes = np.empty(len(source), dtype=np.int32)
    for index in range(len(source)):
        name = source.name(index)
        folder, slash, _ = name.partition("/")
        if not slash:
            raise UserError(f"{spec} has class folders, but {name} lies in none of them")
        codes[index] = place[folder]
    return codes


def _list_labels(source: FileListSource) -> ClassLabels:
    """The column headed ``label`` or ``class``; without a heading, the second."""
    path = source.file
    rows = list_rows(path)
    first = next(rows)
    headed = is_heading(path, first)
    column = _label_column(path, first, headed)
    met: dict[str, int] = {}
    codes = []
    for row in rows if headed else itertools.chain([first], rows):
        label = row[column] if len(row) > column else ""
        if not label:
            raise UserError(f"{path} gives no label for {row[0]}")
        codes.append(met.setdefault(label, len(met)))
    classes = sorted(met)
    place = np.empty(len(met), dtype=np.int32)
    place[[met[name] for name in classes]] = np.arange(len(met))
    return ClassLabels(classes, place[codes])


def _label_column(path: Path, first_row: list[str], headed: bool) -> int:
    if headed:
        column = next((i for i, name in enumerate(first_row) if name.lower() in LABEL_HEADERS), None)
    else:
        column = 1 if len(first_row) > 1 else None
    if column is None:
        raise UserError(f"{path} has no labels; a list with classes is a .csv with the columns path,label")
    return column


def check_same_classes(train: ImageLabels, val: ImageLabels, spec: str) -> None:
    """Refuse validation data that is labelled otherwise than the training data.

    Args:
        train: Labels of the training images.
        val: Labels of the validation images.
        spec: What the validation data was opened by.

    Raises:
        UserError: Names classes that only one of the two has.
    """
    if train.classes == val.classes:
        return
    missing = sorted(set(train.classes) - set(val.classes))
    extra = sorted(set(val.classes) - set(train.classes))
    parts = [f"{what} {_some(names)}" for what, names in (("lacks", missing), ("adds", extra)) if names]
    raise UserError(f"{spec} has other classes than the training data: it {' and '.join(parts)}")


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} others" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class SpreadSource:
    """So many images of a source, at even distances: of sorted class folders the first ones are few classes.

    Attributes:
        indices: int64 ``(count,)``, their places in the source.
    """

    def __init__(self, source: ImageSource, count: int) -> None:
        self.kind = source.kind
        self.source = source
        self.indices = torch.arange(count) * len(source) // count

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises UnreadableImage."""
        return self.source.load(int(self.indices[index]))

    def fingerprint(self) -> str:
        text = f"{self.source.fingerprint()}|{len(self)}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
