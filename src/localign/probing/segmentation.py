"""Labelled images for probing: the protocol of a source, sources in folders, and batches."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from localign.backbones.preprocessing import UNSTATED, Preprocessing
from localign.data.decoding import UnreadableImage, opened, read_bytes, read_image, unreadable_on_failure
from localign.data.sources import SUFFIXES
from localign.data.transforms import EvalTransform, NativeView
from localign.data.untrusted.faults import machine_faults
from localign.data.untrusted.walking import FILE, FOLDER, kind_of, skipped_line
from localign.data.workers import data_loader, served
from localign.engine.distributed import TIMEOUT
from localign.errors import UserError
from localign.probing.classes import IGNORED, ClassTable, class_table
from localign.text.printing import printable

MAP_SUFFIX = ".png"
"""File name ending of label maps; upper case is accepted too."""

_PNG, _HEADER, _GREY = b"\x89PNG\r\n\x1a\n", b"IHDR", 0

FINGERPRINTED = 256
"""Number of image and label map pairs whose bytes enter a data set's fingerprint."""


@runtime_checkable
class LabelledSource(Protocol):
    """Random access to images with label maps. Sources are pickled for loader workers.

    Subclasses of this class inherit the defaults of ``attributes`` and ``class_kinds``. A source may also have an
    attribute ``ignores``: if it is True, the code that follows the last code marks pixels to ignore.
    """

    kind: str
    """The sort of data, for results: "coco-stuff", "ade20k", ..."""
    classes: tuple[str, ...]
    """Class names by class id."""

    @property
    def attributes(self) -> NDArray[np.bool_] | None:
        """bool ``(codes, classes)``: label maps hold codes, and row c has the classes of code c. None: label maps hold
        class ids."""
        return None

    @property
    def class_kinds(self) -> tuple[str, ...] | None:
        """Kinds by class id, "thing", "stuff" or "other"; None if unknown."""
        return None

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """A stable name of an image, for logs."""

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[Any]]:
        """The image in RGB and its integer label map ``(H, W)`` of the same size.

        All maps of a source have the same dtype. With uint8 the loader's batches are smallest.
        """

    def fingerprint(self) -> str:
        """A short hash of the source's content."""


def attribute_table(source: LabelledSource) -> Tensor | None:
    """A source's :attr:`~LabelledSource.attributes` as a tensor on the CPU."""
    return None if source.attributes is None else torch.from_numpy(np.ascontiguousarray(source.attributes))


def ignores_pixels(source: LabelledSource) -> bool:
    """Whether the code that follows a source's last code marks pixels to ignore."""
    return bool(getattr(source, "ignores", False))


class AttributeLabels:
    """A source whose label maps hold codes that each belong to several classes.

    Args:
        source: A labelled source.
        classes: C class names; class 0 is the ground.
        table: bool ``(codes, C)``, the classes of each code.
    """

    class_kinds: tuple[str, ...] | None = None

    def __init__(self, source: LabelledSource, classes: Sequence[str], table: NDArray[np.bool_]) -> None:
        if table.shape[1] != len(classes):
            raise ValueError(f"the table has {table.shape[1]} columns for {len(classes)} classes")
        self.source = source
        self.kind = source.kind
        self.classes = tuple(classes)
        self.attributes = table
        self.ignores = ignores_pixels(source)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """The image's name in the source."""
        return self.source.name(index)

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[Any]]:
        """The image and the codes of its pixels."""
        return self.source.load_labelled(index)

    def fingerprint(self) -> str:
        """A hash of the source and the table."""
        digest = hashlib.blake2b(self.source.fingerprint().encode(), digest_size=8)
        digest.update(json.dumps(self.classes).encode())
        digest.update(np.packbits(self.attributes).tobytes())
        return digest.hexdigest()


class FolderSegmentation:
    """Images in one folder and label maps of the same names in another: ``a.jpg`` and ``a.png``.

    A label map is a PNG file, grey or with a palette, of 1 to 16 bits; its samples (or places in the palette) are taken
    as the file stores them. It belongs to the image's pixels as stored: EXIF orientation is ignored.
    Opening lists each folder once and opens no image. Pipes, sockets and devices are skipped.

    Args:
        images_dir: Folder of images, without subfolders. If it is also ``masks_dir``, its PNG files are label maps.
        masks_dir: Folder of label maps.
        classes: A class table, or an argument of :func:`localign.probing.classes.class_table`.
        kind: The sort of data, for results.

    Raises:
        UserError: A folder or the class table is missing or empty, an image has no label map, or two images share
            a label map.
    """

    attributes = None

    def __init__(
        self,
        images_dir: str | os.PathLike[str],
        masks_dir: str | os.PathLike[str],
        classes: ClassTable | str | Path | Mapping[Any, Any] | Sequence[Any],
        *,
        kind: str = "segmentation",
    ) -> None:
        self.images_dir, self.masks_dir, self.kind = Path(images_dir), Path(masks_dir), kind
        self.table = classes if isinstance(classes, ClassTable) else class_table(classes)
        self.classes, self.class_kinds = self.table.names, self.table.kinds
        self.ignores = self.table.ignore is not None
        self._images, self._masks = _pairs_of(self.images_dir, self.masks_dir)
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """The image's file name."""
        return self._images[index]

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises UnreadableImage."""
        return read_image(self.images_dir / self._images[index], self._images[index], upright=False)

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[Any]]:
        """The image in RGB and its class ids ``(H, W)``, with the same dtype for all images.

        Pixels to ignore have the number of classes.

        Raises:
            UnreadableImage: The image cannot be decoded.
            UserError: The label map cannot be decoded, differs from the image in size, has more than one channel, or
                holds a value that is not in the class table.
        """
        image = self.load(index)
        path = self.masks_dir / self._masks[index]
        values = _read_values(path)
        if values.shape != (image.height, image.width):
            raise UserError(
                f"the label map {printable(path)} has {values.shape[1]} x {values.shape[0]} pixels, "
                f"its image {image.width} x {image.height}"
            )
        try:
            return image, self.table.classes_of(values)
        except ValueError as error:
            allowed = f"; the table has {self.table.values}" if self.table.values else ""
            raise UserError(
                f"the label map {printable(path)} holds values that are not in the class table (--ignore leaves out "
                f"the pixels of one value): {error.args[0]}{allowed}"
            ) from None

    def fingerprint(self) -> str:
        """A hash of the file names, the class table, and the bytes of up to 256 pairs at even distances.

        The fingerprint changes when images are added or removed, when classes are renamed or renumbered, and when
        all files are resized or annotated again under the same names. It does not depend on where the folders are.
        A change to a few files of a larger set may not change it.

        Raises:
            UserError: A file cannot be read.
        """
        if self._fingerprint is None:
            content = [self.kind, self._images, self.classes, self.table.ids.tolist()]
            if self.table.ignore not in (None, IGNORED):  # without the default, older fingerprints stay valid
                content.append(self.table.ignore)
            text = json.dumps(content)
            digest = hashlib.blake2b(text.encode(), digest_size=8)
            for index in np.unique(np.linspace(0, len(self) - 1, FINGERPRINTED).round().astype(int)).tolist():
                for path in (self.images_dir / self._images[index], self.masks_dir / self._masks[index]):
                    digest.update(hashlib.blake2b(_read_bytes(path)).digest())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _pairs_of(images_dir: Path, masks_dir: Path) -> tuple[list[str], list[str]]:
    """Names of the image files, sorted, and of their label maps."""
    shared = images_dir == masks_dir
    masks: dict[str, str] = {}
    images: dict[str, str] = {}
    for name in sorted(_listing(images_dir)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in SUFFIXES or (shared and suffix.lower() == MAP_SUFFIX):
            continue
        if stem in images:
            raise UserError(
                f"{images[stem]} and {name} in {images_dir} share the label map {stem}{MAP_SUFFIX}"
            )
        images[stem] = name
    if not images:
        raise UserError(f"no images in the folder {images_dir}")
    for name in _listing(masks_dir):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == MAP_SUFFIX:
            masks[stem] = name
    without = [stem for stem in images if stem not in masks]
    if without:
        missing = masks_dir / f"{without[0]}{MAP_SUFFIX}"
        count = f"{len(without)} of {len(images)}"
        raise UserError(f"{count} images have no label map; the first missing file is {missing}")
    return list(images.values()), [masks[stem] for stem in images]


def _listing(folder: Path) -> list[str]:
    """The names of all files in a folder."""
    try:
        with os.scandir(folder) as entries:
            kinds = {entry.name: kind_of(entry) for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        raise UserError(f"cannot list the folder {printable(folder)}: {error.strerror}") from None
    special = [(name, kind) for name, kind in sorted(kinds.items()) if kind not in (FILE, FOLDER)]
    if special:
        print(f"data       {skipped_line(special, 'file')} in {printable(folder)}", file=sys.stderr)
    return [name for name, kind in kinds.items() if kind == FILE]


def _read_bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, printable(path))
    except UnreadableImage as error:
        raise UserError(f"cannot read {error}") from None


def _read_values(path: Path) -> NDArray[Any]:
    """The samples of a label map as the file stores them, integers ``(H, W)``."""
    name = printable(path)
    try:
        data = read_bytes(path, name)
        if not data.startswith(_PNG) or data[12:16] != _HEADER:
            raise UnreadableImage(name, "not a PNG image")
        with unreadable_on_failure(name), opened(data, name) as image:
            values = np.asarray(image)
    except UnreadableImage as error:
        raise UserError(f"cannot read the label map {name}: {printable(error.reason)}") from None
    if values.ndim != 2:
        raise UserError(f"the label map {name} has {values.shape[-1]} channels; a label map has one")
    depth, colour = data[24], data[25]
    if colour == _GREY and depth in (2, 4):  # Pillow stretches these to 0..255
        values, rest = np.divmod(values, np.uint8(255 // (2**depth - 1)))
        if rest.any():
            raise UserError(f"cannot read the label map {name}: it has more than one header")
    return values.astype(np.uint8) if values.dtype == bool else values


class _LabelledDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images and label maps as the benchmark crops and resizes them."""

    def __init__(self, source: LabelledSource, view: EvalTransform | NativeView) -> None:
        self.source, self.view = source, view

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with machine_faults(f"image {index} of the labelled data"):
            try:
                image, labels = self.source.load_labelled(index)
            except UnreadableImage as error:
                # Skipping the image would change the metrics.
                raise UserError(f"cannot probe with an unreadable image: {error}") from None
            maps = self.view.labels(labels)
            return self.view(image), maps.to(torch.uint8) if labels.dtype == np.uint8 else maps


def _rows(count: int, batch: int) -> Iterator[list[int]]:
    for first in range(0, count, batch):
        yield list(range(first, min(first + batch, count)))


def labelled_batches(
    source: LabelledSource,
    image_size: tuple[int, int],
    batch: int,
    workers: int = 0,
    timeout: float = TIMEOUT,
    preprocessing: Preprocessing = UNSTATED,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of a source once, in order, as the benchmark crops and resizes them.

    The largest centred crop with the aspect ratio of ``image_size`` is resized, with the backbone's filter or bilinear
    for the image and nearest for the label map. There is no augmentation.

    Args:
        source: Labelled images.
        image_size: Height and width, pixels.
        batch: Images per batch; the last batch may hold fewer.
        workers: Loader processes; 0 loads in the calling process.
        timeout: Seconds without a batch from the processes after which the pass fails.
        preprocessing: Of the backbone, for its filter.

    Yields:
        Images, uint8 ``(B, 3, H, W)``, and codes ``(B, H, W)``: uint8 if the source's maps are uint8, else int64.

    Raises:
        UserError: An image or label map is bad.
        RunFailure: A loader process dies or hangs, or the machine is at fault: no memory, or a disk that fails.
    """
    view = EvalTransform(image_size, mode="square", preprocessing=preprocessing)
    reader = _LabelledBatches(_LabelledDataset(source, view))
    yield from served(data_loader(reader, partial(_rows, len(source), batch), workers, False, None, timeout))


def native_labelled_batches(
    source: LabelledSource, view: NativeView, batch: int, workers: int = 0, timeout: float = TIMEOUT
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Like :func:`labelled_batches`, with whole images that keep their aspect ratio: a list of images and codes.

    Args:
        source, batch, workers, timeout: As for :func:`labelled_batches`.
        view: The sizes of images and label maps.
    """
    reader = _NativeBatches(_LabelledDataset(source, view))
    yield from served(data_loader(reader, partial(_rows, len(source), batch), workers, False, None, timeout))


class _NativeBatches(Dataset[list[tuple[Tensor, Tensor]]]):
    def __init__(self, images: _LabelledDataset) -> None:
        self.images = images

    def __getitem__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return [self.images[index] for index in indices]


class _LabelledBatches(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: _LabelledDataset) -> None:
        self.images = images

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, maps = zip(*(self.images[index] for index in indices), strict=True)
        return torch.stack(images), torch.stack(maps)
