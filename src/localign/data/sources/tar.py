"""Images in local tar shards, read where they lie in the files."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from localign.data.decoding import UnreadableImage, check_bytes, unreadable_on_failure
from localign.data.sources.base import EncodedSource
from localign.data.sources.tar_index import OFFSET, SHARD, SIZE, tar_index
from localign.errors import UserError


class TarSource(EncodedSource):
    """The image members of tar shards, in the order of the shards and of their members.

    The layout is webdataset's; members that are no images are passed over. A member's name is the image's.

    Args:
        shards: The files. They are indexed once, see :mod:`localign.data.sources.tar_index`.
        image_size: As for ``FolderSource``.

    Attributes:
        shards: The files.
        unreadable: (name, reason) of links, and of shards that are cut short.

    Raises:
        UserError: A shard is missing or no tar file, leads out of itself, or all of them hold no image.
    """

    kind = "tar"

    def __init__(
        self, shards: Sequence[str | os.PathLike[str]], image_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(image_size)
        self.shards = tuple(Path(shard) for shard in shards)
        if not self.shards:
            raise UserError("no tar shards to read")
        self.index = tar_index(self.shards)
        self.unreadable = self.index.problems
        self._files = OpenFiles()

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        """The member's name."""
        return self.index.names[index]

    def encoded(self, index: int) -> bytes:
        name = self.name(index)
        record = self.index.records[index]
        offset, size = int(record[OFFSET]), int(record[SIZE])
        check_bytes(size, name)
        with unreadable_on_failure(name):
            data = os.pread(self._descriptor(int(record[SHARD])), size, offset)
        if len(data) < size:
            raise UnreadableImage(name, "truncated: its shard ends before it does")
        return data

    def _descriptor(self, shard: int) -> int:
        return self._files(self.shards[shard])

    def _digest(self, digest: hashlib.blake2b) -> None:
        self.index.names.update(digest)
        digest.update(self.index.records[:, SIZE].astype("<i8").tobytes())


class OpenFiles:
    """File descriptors for positioned reads, of the files last used; forked processes can share them."""

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __call__(self, path: Path) -> int:
        """The descriptor of a file. Raises OSError."""
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > self.most:
                os.close(self._open.popitem(last=False)[1])
        return self._open[path]

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int]]:
        return OpenFiles, (self.most,)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
