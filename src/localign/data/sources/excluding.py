"""A source without the images that a list names."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from localign.data.decoding import UndecodedJpeg
from localign.data.sources.base import ImageSource, load_pixels, load_undecoded
from localign.data.sources.files import listed_names
from localign.errors import UserError


class ExcludingSource:
    """The images of a source that are not named in a list, in their order.

    Args:
        source: All images.
        file: The list, .txt, .csv or .jsonl, as ``localign data verify`` writes it; its paths are names of the
            source.

    Attributes:
        kept: int64, the places in the source of the images that are left.
        excluded: How many are not.

    Raises:
        UserError: The list names nothing of the source, or everything.
    """

    def __init__(self, source: ImageSource, file: str | os.PathLike[str]) -> None:
        self.kind, self.source = source.kind, source
        names = frozenset(listed_names(Path(file)))
        keep = np.fromiter((source.name(i) not in names for i in range(len(source))), bool, len(source))
        self.kept = np.flatnonzero(keep)
        self.excluded = len(source) - len(self.kept)
        if names and not self.excluded:
            example = f"{sorted(names)[0]!r} against {source.name(0)!r}"
            raise UserError(f"the exclusion list {file} names nothing in the data: {example}")
        if not len(self.kept):
            raise UserError(f"the exclusion list {file} leaves no image of the data")
        self.unreadable = tuple(u for u in getattr(source, "unreadable", ()) if u[0] not in names)
        blocks = getattr(source, "blocks", None)
        self.blocks = None if blocks is None else _left(keep, blocks)
        self.window = getattr(source, "window", 1)
        self.notice = getattr(source, "notice", None)

    def __len__(self) -> int:
        return len(self.kept)

    def name(self, index: int) -> str:
        """The source's name of the image."""
        return self.source.name(int(self.kept[index]))

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises UnreadableImage."""
        return self.source.load(int(self.kept[index]))

    def pixels(self, index: int) -> Tensor:
        """The image as uint8 ``(3, H, W)``. Raises UnreadableImage."""
        return load_pixels(self.source, int(self.kept[index]))

    def undecoded(self, index: int) -> Image.Image | UndecodedJpeg:
        """The image, a JPEG before it is decoded. Raises UnreadableImage."""
        return load_undecoded(self.source, int(self.kept[index]))

    def fingerprint(self) -> str:
        """Of the source and of what is left of it."""
        digest = hashlib.blake2b(self.source.fingerprint().encode(), digest_size=8)
        digest.update(self.kept.astype("<i8").tobytes())
        return digest.hexdigest()


def _left(keep: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """How many images of each block are kept."""
    before = np.concatenate([[0], np.cumsum(keep)])
    ends = np.cumsum(blocks)
    return before[ends] - before[ends - blocks]
