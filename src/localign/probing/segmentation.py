"""Labelled images for probing: the protocol, the folder layout, and batches of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localign.data.sources import SUFFIXES, UnreadableImage, read_image
from localign.data.transforms import EvalTransform
from localign.errors import UserError
from localign.probing.classes import ClassTable, class_table

MAP_SUFFIX = ".png"
"""File name ending of label maps, in any case."""

FINGERPRINTED = 256
"""How many pairs of a set have their content in its fingerprint."""


@runtime_checkable
class LabelledSource(Protocol):
    """Random access to images with a label map; picklable, for loader workers.

    Beyond these members a source may have ``attributes``, bool ``(codes, len(classes))``: then its maps hold
    codes, and the table says which classes a code belongs to. Otherwise a map holds class ids. And it may
    have ``class_kinds``, "thing", "stuff" or "other" for each class; None where unknown.
    """

    kind: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """How many images there are."""

    def name(self, index: int) -> str:
        """A stable name for logs."""

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[Any]]:
        """The image in RGB and its integer label map ``(H, W)``, of the same size.

        All maps of a source have one type; uint8 makes the loader's batches small.
        """

    def fingerprint(self) -> str:
        """A short hash of what the source holds."""


class AttributeLabels:
    """A source whose codes stand for several classes at once.

    Args:
        source: Any labelled source.
        classes: The classes' names, C of them; class 0 is the ground.
        table: bool ``(codes, C)``.
    """

    def __init__(self, source: LabelledSource, classes: Sequence[str], table: NDArray[np.bool_]) -> None:
        if table.shape[1] != len(classes):
            raise ValueError(f"the table has {table.shape[1]} columns for {len(classes)} classes")
        self.source = source
        self.kind = source.kind
        self.classes = tuple(classes)
        self.attributes = table

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """The source's name of the image."""
        return self.source.name(index)

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[Any]]:
        """The source's image and codes."""
        return self.source.load_labelled(index)

    def fingerprint(self) -> str:
        """Of the source and the table."""
        digest = hashlib.blake2b(self.source.fingerprint().encode(), digest_size=8)
        digest.update(json.dumps(self.classes).encode())
        digest.update(np.packbits(self.attributes).tobytes())
        return digest.hexdigest()


class FolderSegmentation:
    """Images in one folder, label maps of the same names in another: ``a.jpg`` and ``a.png``.

    A label map is a single-channel PNG image. It belongs to its image's pixels as they are stored: an EXIF
    orientation is passed over. Opening lists each folder once and looks at no file.

    Args:
        images_dir: Folder of images, flat. Where it is the folder of label maps too, its PNG files are maps.
        masks_dir: Folder of label maps.
        classes: The table, or what :func:`localign.probing.classes.class_table` makes one of.
        kind: What sort of data it is, for results.

    Attributes:
        class_kinds: "thing", "stuff" or "other" for each class, or None where unknown.

    Raises:
        UserError: a folder or the table is missing or empty, an image has no label map, or two images share
            one.
    """

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
        self._images, self._masks = _pairs_of(self.images_dir, self.masks_dir)
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """The image's file name."""
        return self._images[index]

    def load(self, index: int) -> Image.Image:
        """The image alone, in RGB. Raises UnreadableImage."""
        return read_image(self.images_dir / self._images[index], self._images[index], upright=False)

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[Any]]:
        """The image in RGB and its class ids ``(H, W)``, of one type in all images.

        Raises:
            UnreadableImage: the image cannot be decoded.
            UserError: the label map cannot be decoded, has another size or more than one channel, or holds a
                value that the table does not.
        """
        image = self.load(index)
        path = self.masks_dir / self._masks[index]
        values = _read_values(path)
        if values.shape != (image.height, image.width):
            raise UserError(
                f"the label map {path} has {values.shape[1]} x {values.shape[0]} pixels, "
                f"its image {image.width} x {image.height}"
            )
        try:
            return image, self.table.classes_of(values)
        except ValueError as error:
            allowed = f"; it knows {self.table.values}" if self.table.values else ""
            held = f"holds values that the class table does not know: {error.args[0]}"
            raise UserError(f"the label map {path} {held}{allowed}") from None

    def fingerprint(self) -> str:
        """Of the file names, the class table, and the bytes of up to 256 pairs spread evenly over the set.

        So it changes when images come or go, when classes are named or numbered anew, and when a set is
        exported, resized or annotated afresh under the same names; not with where the folders lie. A change
        to a few files of a larger set can escape it.

        Raises:
            UserError: a file cannot be read.
        """
        if self._fingerprint is None:
            text = json.dumps([self.kind, self._images, self.classes, self.table.ids.tolist()])
            digest = hashlib.blake2b(text.encode(), digest_size=8)
            for index in np.unique(np.linspace(0, len(self) - 1, FINGERPRINTED).round().astype(int)).tolist():
                for path in (self.images_dir / self._images[index], self.masks_dir / self._masks[index]):
                    digest.update(hashlib.blake2b(_read_bytes(path)).digest())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _pairs_of(images_dir: Path, masks_dir: Path) -> tuple[list[str], list[str]]:
    """File names of images, sorted, and of their label maps."""
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
        wanted = masks_dir / f"{without[0]}{MAP_SUFFIX}"
        count = f"{len(without)} of {len(images)}"
        raise UserError(f"{count} images have no label map; the first missing is {wanted}")
    return list(images.values()), [masks[stem] for stem in images]


def _listing(folder: Path) -> list[str]:
    try:
        return [entry for entry in os.listdir(folder) if not entry.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _read_values(path: Path) -> NDArray[Any]:
    """The pixel values of a label map, ``(H, W)``."""
    try:
        with Image.open(path, formats=["PNG"]) as mask:
            values = np.asarray(mask)
    except Exception as error:  # decoders raise anything on corrupt files
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "not a PNG image" if unknown else getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the label map {path}: {reason}") from None
    if values.ndim != 2:
        raise UserError(f"the label map {path} has {values.shape[-1]} channels; it must have one")
    return values.astype(np.uint8) if values.dtype == bool else values


class _Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Images and label maps under the benchmark's view."""

    def __init__(self, source: LabelledSource, image_size: tuple[int, int]) -> None:
        self.source = source
        self.view = EvalTransform(image_size, mode="square")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        try:
            image, labels = self.source.load_labelled(index)
        except UnreadableImage as error:
            # Leaving it out would change what is measured.
            raise UserError(f"cannot probe on an unreadable image: {error}") from None
        maps = self.view.labels(labels)
        return self.view(image), maps.to(torch.uint8) if labels.dtype == np.uint8 else maps


def labelled_batches(
    source: LabelledSource, image_size: tuple[int, int], batch: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of a source once, in order, as the benchmark sees them.

    The largest centre piece of the wanted aspect (a square, usually), resized: bilinear for the image,
    nearest for the label map; no augmentation.

    Args:
        source: Labelled images.
        image_size: Height and width in pixels.
        batch: Images per batch; the last may hold fewer.
        workers: Loader processes; 0 loads in the caller.

    Yields:
        uint8 ``(B, 3, H, W)``, and ``(B, H, W)`` codes: uint8 where the source's maps are, else int64.

    Raises:
        UserError: what the source raises, or an unreadable image.
    """
    pairs = _Pairs(source, image_size)
    loader = DataLoader(
        pairs,
        batch_size=batch,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_one_thread if workers else None,
        generator=torch.Generator(),  # else the pass would draw from the global one
    )
    try:
        yield from loader
    except UserError as error:
        # From a worker the message arrives wrapped in a traceback; its last line is the one we wrote.
        last = str(error).strip().rpartition("\n")[2]
        error.__traceback__ = None  # it would keep the loader alive, whose workers then end late
        raise UserError(last.partition("UserError: ")[2] or last) from None


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
