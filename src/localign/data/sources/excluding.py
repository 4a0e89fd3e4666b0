"""A source without the images that an exclusion list names."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from localign.data.decoding import UndecodedJpeg
from localign.data.image_source import ImageSource
from localign.data.sources.lists import read_list
from localign.errors import UserError


class ExcludingSource(ImageSource):
    """The images of a source that a list does not name, in the source's order.

    Args:
        source: All images.
        file: A .txt, .csv or .jsonl list of image names, as ``localign data verify`` writes it.

    Attributes:
        indices: int64, indices in the source of the remaining images.
        excluded: Number of excluded images.

    Raises:
        UserError: The list names no image of the source, or all images.
    """

    def __init__(self, source: ImageSource, file: str | os.PathLike[str]) -> None:
        self.kind, self.source = source.kind, source
        names = frozenset(read_list(Path(file)).names)
        keep = np.fromiter((source.name(i) not in names for i in range(len(source))), bool, len(source))
        self.indices = np.flatnonzero(keep)
        self.excluded = len(source) - len(self.indices)
        if names and not self.excluded:
            example = f"{sorted(names)[0]!r} against {source.name(0)!r}"
            raise UserError(f"the exclusion list {file} names no image of the data: {example}")
        if not len(self.indices):
            raise UserError(f"the exclusion list {file} excludes every image of the data")
        self.unreadable = tuple(u for u in source.unreadable if u[0] not in names)
        self.blocks = None if source.blocks is None else _remaining(keep, source.blocks)
        self.window = source.window

    @property
    def notice(self) -> str | None:
        """The source's notice."""
        return self.source.notice

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """The image's name in the source."""
        return self.source.name(int(self.indices[index]))

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises UnreadableImage."""
        return self.source.load(int(self.indices[index]))

    def pixels(self, index: int) -> Tensor:
        """The image as uint8 ``(3, H, W)``. Raises UnreadableImage."""
        return self.source.pixels(int(self.indices[index]))

    def undecoded(self, index: int) -> Image.Image | UndecodedJpeg:
        """See :meth:`ImageSource.undecoded`."""
        return self.source.undecoded(int(self.indices[index]))

    def fingerprint(self) -> str:
        """A hash of the source's fingerprint and the remaining images."""
        digest = hashlib.blake2b(self.source.fingerprint().encode(), digest_size=8)
        digest.update(self.indices.astype("<i8").tobytes())
        return digest.hexdigest()


def _remaining(keep: NDArray[np.bool_], blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of remaining images in each block."""
    before: NDArray[np.int64] = np.concatenate([[0], np.cumsum(keep)])
    ends = np.cumsum(blocks)
    remaining: NDArray[np.int64] = before[ends] - before[ends - blocks]
    return remaining
