"""Labels of whole images, from class folders, lists or parquet files with a label column, or scenes.

Labels do not pass through the loader. They are looked up by a batch's ``indices``, which also name the image
that replaced an unreadable image.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from localign.data.image_source import ImageSource
from localign.data.scenes import SceneSource, pair_presence
from localign.data.sources import (
    ExcludingSource,
    FileListSource,
    FolderSource,
    ParquetSource,
    TarSource,
)
from localign.data.sources.lists import read_list
from localign.data.sources.parquet_labels import labels_column
from localign.data.untrusted.walking import FOLDER, kind_of
from localign.errors import UserError
from localign.text.printing import printable


class ImageLabels(Protocol):
    """The labels of all images of a source."""

    classes: tuple[str, ...]
    """Class names; sorted if they come from folders or lists."""
    multi_label: bool
    """True if an image may show any number of classes; False if it shows exactly one."""

    def targets(self, indices: Tensor) -> Tensor:
        """float32 ``(batch, classes)``, 1 where the image shows the class, for int64 indices ``(batch,)``."""

    def fingerprint(self) -> str:
        """A short hash of the classes and labels."""


class ClassLabels:
    """One class per image.

    Args:
        classes: Class names.
        codes: Integers ``(images,)``: each image's class as an index into ``classes``.
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
    """The shape-colour pairs that each scene shows. A scene is drawn on first use, and its labels are cached."""

    multi_label = True

    def __init__(self, source: SceneSource) -> None:
        self.classes = source.config.classes[1:]
        self._source = source
        self._presence = np.zeros((len(source), len(self.classes)), dtype=bool)
        self._known = np.zeros(len(source), dtype=bool)

    def targets(self, indices: Tensor) -> Tensor:
        rows = indices.numpy()
        for index in rows[~self._known[rows]].tolist():
            self._presence[index] = pair_presence(self._source.config, self._source.load_labelled(index)[1])
            self._known[index] = True
        return torch.from_numpy(self._presence[rows]).float()

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def labels_of(source: ImageSource, spec: str) -> ImageLabels:
    """The labels of an opened source.

    Args:
        source: Class folders (also inside tar shards), a list or parquet files with a label column, scenes, or
            such a source with an exclusion list.
        spec: The ``--data`` value, for error messages.

    Raises:
        UserError: The source has no labels, unlabelled images, an empty class folder, or a single class.
    """
    if isinstance(source, SceneSource):
        return SceneLabels(source)
    labels = _class_labels(source, spec)
    if len(labels.classes) == 1:
        raise UserError(
            f"{spec} has a single class, {labels.classes[0]!r}; classification needs at least two"
        )
    return labels


def _class_labels(source: ImageSource, spec: str) -> ClassLabels:
    if isinstance(source, FolderSource):
        return _folder_labels(source)
    if isinstance(source, TarSource):
        if source.index.labels is not None:
            return _sample_labels(source, spec)
        folders = sorted({source.place(i)[1].partition("/")[0] for i in range(len(source))})
        return ClassLabels(folders, _first_folders(source, folders, spec))
    if isinstance(source, FileListSource):
        return _list_labels(source)
    if isinstance(source, ParquetSource) and (found := labels_column(source.files)) is not None:
        return ClassLabels(*found)
    if isinstance(source, ExcludingSource):
        labels = _class_labels(source.source, spec)
        return ClassLabels(labels.classes, labels.codes[source.indices])
    raise UserError(f"{spec} has no labels for whole images")


def _folder_labels(source: FolderSource) -> ClassLabels:
    """Each image's class is its top-level folder, as in torchvision's ImageFolder."""
    root = source.root
    with os.scandir(root) as entries:
        skipped = {name for name, _ in source.skipped}
        folders = sorted(
            e.name
            for e in entries
            if not e.name.startswith(".") and e.name not in skipped and kind_of(e) == FOLDER
        )
    if not folders:
        raise UserError(f"{root} has no class folders; put the images into one folder per class")
    codes = _first_folders(source, folders, str(root))
    empty = np.flatnonzero(np.bincount(codes, minlength=len(folders)) == 0)
    if len(empty):
        more = f" (and {len(empty) - 1} others)" if len(empty) > 1 else ""
        raise UserError(f"the class folder {root / folders[empty[0]]}{more} holds no images")
    return ClassLabels(folders, codes)


def _first_folders(source: ImageSource, folders: Sequence[str], spec: str) -> NDArray[np.int32]:
    code_of = {name: code for code, name in enumerate(folders)}
    codes = np.empty(len(source), dtype=np.int32)
    for index in range(len(source)):
        name = source.place(index)[1]
        folder, slash, _ = name.partition("/")
        if not slash:
            raise UserError(f"{spec} has class folders, but {printable(name)} is not in a class folder")
        codes[index] = code_of[folder]
    return codes


def _list_labels(source: FileListSource) -> ClassLabels:
    """Labels from the column with a heading such as ``label``, or from the second column if there is no heading."""
    shown = printable(source.file)
    listed = read_list(source.file, source.root)
    if listed.labels is None:
        raise UserError(f"{shown} has no labels; use a .csv file with the columns path,label")
    if listed.odd_label:
        raise UserError(f"{shown}, {listed.odd_label}; a label is a word or a number")
    if "" in listed.labels:
        name = listed.names[listed.labels.index("")]
        raise UserError(f"{shown} gives no label for {printable(name)}")
    return classes_from(listed.labels)


def _sample_labels(source: TarSource, spec: str) -> ClassLabels:
    """Labels from the fields ``cls`` and ``json`` of the samples in tar shards."""
    assert source.index.labels is not None
    labels = list(source.index.labels)
    if "" in labels:
        name = source.name(labels.index(""))
        raise UserError(f"some samples of {spec} have a label, but {printable(name)} has none")
    numbers = all(label.isdecimal() for label in set(labels))
    return classes_from(labels, key=int if numbers else None)


def classes_from(labels: Sequence[str], key: Callable[[str], int] | None = None) -> ClassLabels:
    """The distinct labels as classes, sorted, by numbers if ``key`` makes them."""
    classes = sorted(set(labels), key=key)
    code_of = {name: code for code, name in enumerate(classes)}
    return ClassLabels(classes, np.fromiter((code_of[label] for label in labels), np.int32, len(labels)))


def check_same_classes(train: ImageLabels, val: ImageLabels, spec: str) -> None:
    """Check that training and validation data have the same classes.

    Args:
        train: Labels of the training images.
        val: Labels of the validation images.
        spec: The ``--val`` value, for error messages.

    Raises:
        UserError: The classes differ; the message names the classes that only one data set has.
    """
    if train.classes == val.classes:
        return
    missing = sorted(set(train.classes) - set(val.classes))
    extra = sorted(set(val.classes) - set(train.classes))
    parts = [f"{verb} {_shortened(names)}" for verb, names in (("lacks", missing), ("adds", extra)) if names]
    raise UserError(f"{spec} and the training data have different classes: {spec} {' and '.join(parts)}")


def _shortened(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} others" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class SpreadSource(ImageSource):
    """``count`` evenly spaced images of a source; the first images of sorted class folders show few classes.

    Attributes:
        indices: int64 ``(count,)``, their indices in the source.
    """

    def __init__(self, source: ImageSource, count: int) -> None:
        self.kind = source.kind
        self.source = source
        self.indices = torch.arange(count) * len(source) // count

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def data_files(self) -> Iterator[tuple[str, str]]:
        """All files of the source."""
        return self.source.data_files()

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises UnreadableImage."""
        return self.source.load(int(self.indices[index]))

    def fingerprint(self) -> str:
        text = f"{self.source.fingerprint()}|{len(self)}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
