"""A source without the images that an exclusion list names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from localign.data.decoding import UndecodedJpeg
from localign.data.image_source import ImageSource
from localign.data.sources.files import FileListSource, FolderSource
from localign.data.sources.layouts.identity import is_shard
from localign.data.sources.lists import read_list
from localign.errors import UserError
from localign.text.printing import printable


class ExcludingSource(ImageSource):
    """The images of a source that a list does not name, in the source's order.

    A line names an image as the source does, or by its shard and its name in the shard, or a file by its absolute path.
    A line without a shard names the images of that name in all shards.

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
        listed = _Listed(source, Path(file))
        keep = np.fromiter((not listed.names_image(i) for i in range(len(source))), bool, len(source))
        self.indices = np.flatnonzero(keep)
        self.excluded = len(source) - len(self.indices)
        if listed.count and not self.excluded:
            example = f"{listed.example} against {printable(repr(source.name(0)))}"
            raise UserError(f"the exclusion list {printable(file)} names no image of the data: {example}")
        if not len(self.indices):
            raise UserError(f"the exclusion list {printable(file)} excludes every image of the data")
        self.unreadable = tuple(u for u in source.unreadable if not listed.names_unreadable(u[0]))
        self._more = self.excluded - listed.count if listed.by_name_alone else 0
        self.blocks = None if source.blocks is None else _remaining(keep, source.blocks)
        self.window = source.window

    @property
    def notice(self) -> str | None:
        """The source's notice, and how many images the list excludes beyond its lines."""
        more = ""
        if self._more > 0:
            more = (
                f"the exclusion list gives no shards, and shards repeat names: {self._more:,} more images than it has "
                "lines are excluded; `localign data verify` writes lists with shards"
            )
        return "; ".join(part for part in (self.source.notice, more) if part) or None

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """The image's name in the source."""
        return self.source.name(int(self.indices[index]))

    def place(self, index: int) -> tuple[str, str]:
        """The image's shard and name."""
        return self.source.place(int(self.indices[index]))

    def data_files(self) -> Iterator[tuple[str, str]]:
        """The files of the images that remain; all shards of the source, if it has shards."""
        if not isinstance(self.source, FolderSource | FileListSource):
            return self.source.data_files()
        source = self.source
        names = (source.name(i) for i in self.indices.tolist())
        return ((name, os.path.join(source.root, name)) for name in names)

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


class _Listed:
    """The images that a list names."""

    def __init__(self, source: ImageSource, file: Path) -> None:
        listed = read_list(file)
        shards = listed.shards or [""] * len(listed.names)
        self.source = source
        self.alone = frozenset(name for name, shard in zip(listed.names, shards, strict=True) if not shard)
        self.in_shards = {(shard, name) for name, shard in zip(listed.names, shards, strict=True) if shard}
        self.count = len(self.alone) + len(self.in_shards)
        self.files = isinstance(source, FolderSource | FileListSource) and any(map(os.path.isabs, self.alone))
        self.repeats = len(source) > 0 and source.name(0) != source.place(0)[1]
        self.by_name_alone = self.repeats and bool(self.alone)
        if self.in_shards:
            self._use_shard_names_of_source(file)

    @property
    def example(self) -> str:
        """An image of the list, for an error."""
        first = min(self.alone) if self.alone else ":".join(min(self.in_shards))
        return printable(repr(first))

    def _use_shard_names_of_source(self, file: Path) -> None:
        """Replace the list's names of shards by the source's, which may have more or fewer folders in front."""
        ours = {self.source.place(i)[0] for i in range(len(self.source))}
        names: dict[str, str] = {}
        for shard in {shard for shard, _ in self.in_shards}:
            same = [name for name in ours if name and (is_shard(name, shard) or is_shard(shard, name))]
            if len(same) > 1 and shard not in same:
                listed = " or ".join(printable(name) for name in sorted(same)[:2])
                raise UserError(
                    f"the exclusion list {printable(file)} names the shard {printable(shard)}, which may be {listed}"
                )
            names[shard] = shard if shard in same or not same else same[0]
        self.in_shards = {(names[shard], name) for shard, name in self.in_shards}

    def names_image(self, index: int) -> bool:
        """Whether the list names this image of the source."""
        place = self.source.place(index)
        if place[1] in self.alone or place in self.in_shards:
            return True
        if self.repeats and self.source.name(index) in self.alone:
            return True
        if self.files:
            assert isinstance(self.source, FolderSource | FileListSource)
            return os.path.abspath(self.source.path(index)) in self.alone
        return False

    def names_unreadable(self, name: str) -> bool:
        """Whether the list names this entry of ``source.unreadable``."""
        shard, _, member = name.partition(":")
        if self.repeats and (shard, member) in self.in_shards:
            return True
        return name in self.alone or (not self.repeats and any(name == other for _, other in self.in_shards))


def _remaining(keep: NDArray[np.bool_], blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of remaining images in each block."""
    before: NDArray[np.int64] = np.concatenate([[0], np.cumsum(keep)])
    ends = np.cumsum(blocks)
    remaining: NDArray[np.int64] = before[ends] - before[ends - blocks]
    return remaining
