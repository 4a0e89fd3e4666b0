"""Images in local tar shards, read by their offsets in the files."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from localign.data.decoding import UnreadableImage, check_bytes
from localign.data.sources.base import EncodedSource
from localign.data.sources.tar_index import OFFSET, SHARD, SIZE, tar_index
from localign.data.untrusted.faults import retried
from localign.errors import RunFailure, UserError


class TarSource(EncodedSource):
    """The image members of tar shards in the webdataset layout, in the order of shards and members.

    Members that are not images are skipped. An image's name is the member's name.

    Args:
        shards: The files. They are indexed once, see :mod:`localign.data.sources.tar_index`.
        image_size: As for ``FolderSource``.

    Attributes:
        shards: The files.
        unreadable: (name, reason) of links and of truncated shards.

    Raises:
        UserError: A shard is missing or not a tar file, a member's name leads out of its shard, or the shards hold
            no images.
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
        shard = int(record[SHARD])
        try:
            data = retried(lambda: self._read(shard, size, offset), f"{name} in {self.shards[shard]}")
        except OSError as error:  # the shard was there when it was indexed: this says nothing about the image
            raise RunFailure(f"{self.shards[shard]} cannot be read any more: {error.strerror}") from None
        if len(data) < size:
            raise UnreadableImage(name, "truncated: its shard ends too early")
        return data

    def _read(self, shard: int, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor(shard), size, offset)
        except OSError:
            self._files.close()  # a descriptor may be stale: the next attempt opens the shard again
            raise

    def _descriptor(self, shard: int) -> int:
        return self._files(self.shards[shard])

    def _digest(self, digest: hashlib.blake2b) -> None:
        self.index.names.update(digest)
        digest.update(self.index.records[:, SIZE].astype("<i8").tobytes())


class OpenFiles:
    """File descriptors of the files used last. Forked processes can share them, because reads give the offset."""

    def __init__(self, max_files: int = 64) -> None:
        self.max_files = max_files
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __call__(self, path: Path) -> int:
        """The descriptor of a file. Raises OSError."""
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > self.max_files:
                os.close(self._open.popitem(last=False)[1])
        return self._open[path]

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[int]]:
        return OpenFiles, (self.max_files,)

    def close(self) -> None:
        """Close all files; a later call opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()
