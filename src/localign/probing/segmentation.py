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


@runtime_checkable
class LabelledSource(Protocol):
    """Random access to images with a label map; picklable, for loader workers.

    Beyond these members a source may have ``attributes``, bool ``(codes, len(classes))``: then its maps hold
    codes, and the table says which classes a code belongs to. Otherwise a map holds class ids.
    """

    kind: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """How many images there are."""

    def name(self, index: int) -> str:
        """A stable name for logs."""

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[Any]]:
        """The image in RGB and its integer label map ``(H, W)``, of the same size."""

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

    A label map is a single-channel image whose values are class ids.

    Args:
        images_dir: Folder of images, flat.
        masks_dir: Folder of label maps (.png).
        classes: A JSON file or a mapping of id -> name, or names in the order of their ids. Ids may have
            gaps; a gap is a class without a name that no pixel may hold. Id 0 is "unlabeled".

    Raises:
        UserError: a folder or the table is missing or empty, or an image has no label map.
    """

    kind = "segmentation"

    def __init__(
        self,
        images_dir: str | os.PathLike[str],
        masks_dir: str | os.PathLike[str],
        classes: str | os.PathLike[str] | Mapping[Any, str] | Sequence[str],
    ) -> None:
        self.images_dir, self.masks_dir = Path(images_dir), Path(masks_dir)
        self.classes, self._known = _class_table(classes)
        images, masks = _listing(self.images_dir), _listing(self.masks_dir)
        self._images = sorted(name for name in images if Path(name).suffix.lower() in SUFFIXES)
        if not self._images:
            raise UserError(f"no images in the folder {self.images_dir}")
        without = [name for name in self._images if f"{Path(name).stem}.png" not in masks]
        if without:
            wanted = self.masks_dir / f"{Path(without[0]).stem}.png"
            count = f"{len(without)} of {len(self._images)}"
            raise UserError(f"{count} images have no label map; the first missing is {wanted}")

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """The image's file name."""
        return self._images[index]

    def load(self, index: int) -> Image.Image:
        """The image alone, in RGB. Raises UnreadableImage."""
        return read_image(self.images_dir / self._images[index], self._images[index])

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[Any]]:
        """The image in RGB and its class ids ``(H, W)``.

        Raises:
            UnreadableImage: the image cannot be decoded.
            UserError: the label map cannot be decoded, has another size or more than one channel, or holds an
                id outside the table.
        """
        image = self.load(index)
        path = self.masks_dir / f"{Path(self._images[index]).stem}.png"
        try:
            with Image.open(path, formats=["PNG"]) as mask:
                labels = np.asarray(mask)
        except Exception as error:  # decoders raise anything on corrupt files
            unknown = isinstance(error, Image.UnidentifiedImageError)
            reason = "not a PNG image" if unknown else f"{type(error).__name__}: {error}"
            raise UserError(f"cannot read the label map {path}: {reason}") from None
        if labels.ndim != 2:
            raise UserError(f"the label map {path} has {labels.shape[-1]} channels; it must have one")
        if labels.shape != (image.height, image.width):
            raise UserError(
                f"the label map {path} has {labels.shape[1]} x {labels.shape[0]} pixels, "
                f"its image {image.width} x {image.height}"
            )
        labels = labels.astype(np.uint8) if labels.dtype == bool else labels
        self._check_ids(labels, path)
        return image, labels

    def _check_ids(self, labels: NDArray[Any], path: Path) -> None:
        low, high = int(labels.min()), int(labels.max())
        if low >= 0 and high < len(self._known) and self._known[labels].all():
            return
        ids = np.unique(labels).tolist()
        strange = [i for i in ids if not (0 <= i < len(self._known) and self._known[i])]
        raise UserError(f"the label map {path} holds ids that the class table does not: {strange[:5]}")

    def fingerprint(self) -> str:
        """Of the file names and the class table."""
        text = json.dumps([self.kind, self._images, self.classes])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _listing(folder: Path) -> set[str]:
    try:
        return {entry for entry in os.listdir(folder) if not entry.startswith(".")}
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from None


def _class_table(
    classes: str | os.PathLike[str] | Mapping[Any, str] | Sequence[str],
) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    """Names by id, and which ids exist."""
    entries: Any = classes
    if isinstance(classes, (str, os.PathLike)):
        path = Path(classes)
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the class table {path}: {error}") from None
    try:
        pairs = entries.items() if isinstance(entries, Mapping) else enumerate(entries)
        table = {int(key): str(value) for key, value in pairs}
    except (ValueError, TypeError) as error:
        raise UserError(f"the class table's keys must be ids: {error}") from None
    if not table or min(table) < 0:
        raise UserError("the class table needs at least one id, and none below 0")
    size = max(table) + 1
    known = np.array([i in table for i in range(size)])
    return tuple(table.get(i, f"(no class {i})") for i in range(size)), known


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
        return self.view(image), self.view.labels(labels)


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
        uint8 ``(B, 3, H, W)`` and int64 ``(B, H, W)`` codes.

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
