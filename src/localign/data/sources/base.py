"""What a source of images is, and what those have in common whose images are encoded files."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from localign.data.decoding import UndecodedJpeg, decode_image, decode_pixels, open_image

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
"""File name endings taken for images, in any case."""

DECODE_HEADROOM = 1.2
"""Scaled decoding keeps each side at least this many times the wanted one: the published crop enlarges by up
to 1 / sqrt(0.8 * 0.9) = 1.18."""


@runtime_checkable
class ImageSource(Protocol):
    """Random access to named images. Instances are picklable: they go to loader workers.

    Beyond these members a source may have ``pixels(index)``, see :func:`load_pixels`; ``undecoded(index)``, see
    :func:`load_undecoded`; ``unreadable``, (name, reason)
    of what it knows to be so from the start; ``blocks`` and ``window`` or ``stream(seed, shuffle)``, see
    :func:`localign.data.stream.sample_stream`; and ``notice``, a line that a run says before it starts.
    """

    kind: str

    def __len__(self) -> int:
        """How many images there are, readable or not."""

    def name(self, index: int) -> str:
        """A stable name for logs, such as ``n01440764/x.jpg``."""

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises UnreadableImage."""

    def fingerprint(self) -> str:
        """A short hash of what the source holds; a run is not continued on another."""


def load_pixels(source: ImageSource, index: int) -> Tensor:
    """An image of any source as uint8 ``(3, H, W)``, upright, channels last in memory. Raises UnreadableImage."""
    if hasattr(source, "pixels"):  # sooner than by way of Pillow
        return source.pixels(index)
    return torch.from_numpy(np.array(source.load(index))).permute(2, 0, 1)


def load_undecoded(source: ImageSource, index: int) -> Image.Image | UndecodedJpeg:
    """An image of any source: a JPEG before it is decoded, where the source has files; else in RGB.

    Raises:
        UnreadableImage: It is known already to be so; a JPEG may turn out to be when it is decoded.
    """
    return source.undecoded(index) if hasattr(source, "undecoded") else source.load(index)


class Names:
    """A read-only sequence of names in one block of bytes.

    For thirteen million files that is a few hundred megabytes which forked workers share, and memory-mapped ones
    spawned workers too; Python strings they would copy.

    Args:
        ends: int64 ``(names,)``, where each name ends in the block.
        block: uint8, the names one after the other as the file system encodes them.
    """

    def __init__(self, ends: NDArray[np.int64], block: NDArray[np.uint8]) -> None:
        self.ends, self.block = ends, block

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Of strings."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        return cls(ends, np.frombuffer(b"".join(encoded), dtype=np.uint8))

    @classmethod
    def joined(cls, parts: Sequence[Names]) -> Names:
        """One sequence of several."""
        before = np.cumsum([0, *(len(part.block) for part in parts)])
        ends = [part.ends + begin for part, begin in zip(parts, before[:-1], strict=True)]
        return cls(np.concatenate(ends), np.concatenate([part.block for part in parts]))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        begin = self.ends[index - 1] if index else 0
        return os.fsdecode(self.block[begin : self.ends[index]].tobytes())

    def update(self, digest: hashlib.blake2b) -> None:
        """Feed all names to a hash."""
        digest.update(struct.pack("<q", len(self)))
        digest.update(self.ends.astype("<i8").tobytes())
        digest.update(self.block.tobytes())


class EncodedSource(ABC):
    """Images that are the bytes of files, wherever those lie.

    Args:
        image_size: (rows, columns) the images will be brought to; large JPEGs are then decoded at a fraction (see
            ``read_image``). None decodes in full, as crops that magnify want it.
    """

    kind: str

    def __init__(self, image_size: tuple[int, int] | None) -> None:
        # The larger side for both, for a file may lie on its side until its EXIF orientation is applied.
        self._at_least = math.ceil(DECODE_HEADROOM * max(image_size)) if image_size else None
        self._fingerprint: str | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are, readable or not."""

    @abstractmethod
    def name(self, index: int) -> str:
        """A stable name for logs."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The file's content. Raises UnreadableImage."""

    @abstractmethod
    def _digest(self, digest: hashlib.blake2b) -> None:
        """Feed what is held, and not where it lies, to a hash."""

    def load(self, index: int) -> Image.Image:
        """The image in RGB, upright. Raises UnreadableImage."""
        return decode_image(self.encoded(index), self.name(index), self._at_least)

    def pixels(self, index: int) -> Tensor:
        """The image as uint8 ``(3, H, W)``, upright. Raises UnreadableImage."""
        return decode_pixels(self.encoded(index), self.name(index), self._at_least)

    def undecoded(self, index: int) -> Image.Image | UndecodedJpeg:
        """A JPEG before it is decoded, any other image as ``load`` gives it. Raises UnreadableImage."""
        return open_image(self.encoded(index), self.name(index))

    def fingerprint(self) -> str:
        """Of the kind, what is held, in order, and the scale of decoding; not of where it lies."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(f"{self.kind}|{self._at_least}".encode(), digest_size=8)
            self._digest(digest)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def is_remote(spec: str) -> bool:
    """Whether this is an address rather than a path."""
    return "://" in spec
