"""The base class of sources whose images are encoded files, and a compact sequence of names."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from localign.data.decoding import UndecodedJpeg, decode_image, decode_pixels, open_image
from localign.data.image_source import ImageSource

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
"""File name suffixes of images, compared in lower case."""

DECODE_HEADROOM = 1.2
"""Scaled decoding keeps each side at least this many times the target size, because the published crop enlarges
by up to 1 / sqrt(0.8 * 0.9) = 1.18."""


class Names:
    """A read-only sequence of names, stored in one block of bytes.

    For thirteen million files the block is a few hundred megabytes. Forked workers share it, and spawned workers
    share it if it is memory-mapped; each worker would copy Python strings.

    Args:
        ends: int64 ``(names,)``, the offset in the block at which each name ends.
        block: uint8, the concatenated names in the file system's encoding.
    """

    def __init__(self, ends: NDArray[np.int64], block: NDArray[np.uint8]) -> None:
        self.ends, self.block = ends, block

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Build the sequence from strings."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        return cls(ends, np.frombuffer(b"".join(encoded), dtype=np.uint8))

    @classmethod
    def joined(cls, parts: Sequence[Names]) -> Names:
        """Concatenate several sequences."""
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

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def update(self, digest: hashlib.blake2b) -> None:
        """Feed all names to a hash."""
        digest.update(struct.pack("<q", len(self)))
        digest.update(self.ends.astype("<i8").tobytes())
        digest.update(self.block.tobytes())


class EncodedSource(ImageSource):
    """A source whose images are encoded files, on disk, in archives or remote.

    Args:
        image_size: (rows, columns) to which images will be resized; large JPEGs are then decoded at reduced size
            (see ``read_image``). None decodes in full, which crops that magnify need.
    """

    def __init__(self, image_size: tuple[int, int] | None) -> None:
        # The larger side counts for both, because an EXIF orientation may swap rows and columns.
        self._at_least = math.ceil(DECODE_HEADROOM * max(image_size)) if image_size else None
        self._fingerprint: str | None = None

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The file's content. Raises UnreadableImage."""

    @abstractmethod
    def _digest(self, digest: hashlib.blake2b) -> None:
        """Feed the content of the source, but not its location, to a hash."""

    def load(self, index: int) -> Image.Image:
        """The image in RGB, upright. Raises UnreadableImage."""
        return decode_image(self.encoded(index), self.name(index), self._at_least)

    def pixels(self, index: int) -> Tensor:
        """The image as uint8 ``(3, H, W)``, upright. Raises UnreadableImage."""
        return decode_pixels(self.encoded(index), self.name(index), self._at_least)

    def undecoded(self, index: int) -> Image.Image | UndecodedJpeg:
        """A JPEG before it is decoded; any other format in RGB, upright. Raises UnreadableImage."""
        return open_image(self.encoded(index), self.name(index))

    def fingerprint(self) -> str:
        """A hash of the kind, the ordered content and the decoding scale, but not of the location."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(f"{self.kind}|{self._at_least}".encode(), digest_size=8)
            self._digest(digest)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def is_remote(spec: str) -> bool:
    """Whether this is a URL rather than a path."""
    return "://" in spec


def name_of(url: str) -> str:
    """The last part of a path, or of a URL without its query."""
    return PurePosixPath(url.partition("?")[0] if is_remote(url) else url).name
