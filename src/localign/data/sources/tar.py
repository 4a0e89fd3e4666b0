"""Images in local tar shards, read by their offsets in the files."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

from localign.data.decoding import UnreadableImage, check_bytes
from localign.data.sources.base import EncodedSource
from localign.data.sources.layouts.identity import short_names
from localign.data.sources.tar_index import OFFSET, SHARD, SIZE, tar_index
from localign.data.untrusted.faults import retried
from localign.errors import RunFailure, UserError


class TarSource(EncodedSource):
    """The images of samples in tar shards in the webdataset layout, in the order of shards and members.

    A sample has one image, see :mod:`localign.data.sources.layouts.webdataset`. An image's name is the member's name,
    after the shard's name if images of different shards have the same name.

    Args:
        shards: The files. They are indexed once, see :mod:`localign.data.sources.tar_index`.
        image_size: As for ``FolderSource``.
        fields: The fields that may hold a sample's image, the first that it has; () for the usual ones.

    Attributes:
        shards: The files.
        unreadable: (name, reason) of links and of truncated shards.

    Raises:
        UserError: A shard is missing or not a tar file, a member's name leads out of its shard, or the shards hold
            no images.
    """

    kind = "tar"

    def __init__(
        self,
        shards: Sequence[str | os.PathLike[str]],
        image_size: tuple[int, int] | None = None,
        fields: tuple[str, ...] = (),
    ) -> None:
        super().__init__(image_size)
        self.shards = tuple(Path(shard) for shard in shards)
        if not self.shards:
            raise UserError("no tar shards to read")
        self.index = tar_index(self.shards, fields)
        self.shard_names = short_names([shard.as_posix() for shard in self.shards])
        self.unreadable = self.index.problems
        self._files = OpenFiles()

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        """The member's name, after the shard's name and a colon if only both together tell the image apart."""
        shard, member = self.place(index)
        return f"{shard}:{member}" if self.index.ambiguous else member

    def place(self, index: int) -> tuple[str, str]:
        """The names of the shard and of the member in it."""
        member = self.index.names[index]
        return self.shard_names[int(self.index.records[index, SHARD])], member

    def data_files(self) -> Iterator[tuple[str, str]]:
        return zip(self.shard_names, map(str, self.shards), strict=True)

    @property
    def notice(self) -> str | None:
        """Image files that are left out, or None."""
        return self.index.notice

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
