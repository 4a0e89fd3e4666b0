"""Images in the rows of parquet files, as the Hugging Face hub keeps data sets."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from localign.data.decoding import UnreadableImage, check_bytes, unreadable_on_failure
from localign.data.sources.base import EncodedSource, is_remote
from localign.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

WINDOW_BYTES = 2**28
"""Memory of the row groups that each loader worker keeps at hand."""
MOST_GROUPS = 16
MAX_GROUP_BYTES = 2**31
"""A row group is read as a whole; larger ones are refused."""
_MOST_OPEN = 16


class ParquetSource(EncodedSource):
    """The rows of parquet files with a column ``image`` of ``{bytes, path}``, or of bytes.

    A row group is read as a whole, so images come in a :class:`localign.data.stream.BlockStream`: shuffled within
    so many row groups at a time as the memory holds. An image is called by its file and row, ``x.parquet:17``.

    Args:
        files: The files, by paths or by addresses that fsspec knows.
        image_size: As for ``FolderSource``.

    Attributes:
        files: The files.
        blocks: int64, the rows of each row group.
        window: How many row groups are kept at hand.

    Raises:
        UserError: pyarrow is not installed; a file is missing, damaged or has no such column, or a row group is too
            large.
    """

    kind = "parquet"

    def __init__(
        self, files: Sequence[str | os.PathLike[str]], image_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(image_size)
        self.files = tuple(str(file) for file in files)
        if not self.files:
            raise UserError("no parquet files to read")
        groups = [
            (number, g, rows, size)
            for number, found in enumerate(_row_groups_of_all(self.files))
            for g, (rows, size) in enumerate(found)
        ]
        self._groups: NDArray[np.int64] = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self.blocks = self._groups[:, 2]
        self._begins = np.cumsum(self.blocks) - self.blocks
        if not self.blocks.sum():
            raise UserError(f"{_named(self.files)} hold no rows")
        largest = int(self._groups[:, 3].max())
        if largest > MAX_GROUP_BYTES:
            raise UserError(
                f"a row group of {_named(self.files)} has {largest / 2**30:.1f} GiB of images; at most "
                f"{MAX_GROUP_BYTES / 2**30:.0f} are read at once: write it with smaller ones, or as tar shards"
            )
        self.window = max(1, min(MOST_GROUPS, WINDOW_BYTES // max(largest, 1)))
        self._cache = _Groups(self.files, self.window)

    def __len__(self) -> int:
        return int(self.blocks.sum())

    @property
    def notice(self) -> str:
        """What is different about the order, and what it costs."""
        rows = int(self.blocks.max())
        far = "each loader worker fetches every row group; " if is_remote(self.files[0]) else ""
        return far + (
            f"parquet is read by row groups of up to {rows} images, shuffled within {self.window} of them at a "
            "time; a run continues exactly at its sample; shards of `localign data shard` are shuffled as a whole"
        )

    def name(self, index: int) -> str:
        """The file's name and the row in it."""
        group = self._group_of(index)
        file = self._groups[group, 0]
        first = self._begins[np.searchsorted(self._groups[:, 0], file)]
        return f"{PurePosixPath(self.files[file]).name}:{index - first}"

    def encoded(self, index: int) -> bytes:
        name, group = self.name(index), self._group_of(index)
        file, number = (int(v) for v in self._groups[group, :2])
        with unreadable_on_failure(name, self.files[file]):
            data = self._cache(file, number)[index - int(self._begins[group])]
        if not data.is_valid:
            raise UnreadableImage(name, "the row has no image bytes")
        check_bytes(data.as_buffer().size, name)
        return data.as_py()

    def _group_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return int(np.searchsorted(self._begins, index, side="right")) - 1

    def _digest(self, digest: hashlib.blake2b) -> None:
        names = [PurePosixPath(file).name for file in self.files]
        digest.update(json.dumps([names, self._groups.tolist()]).encode())


class _Groups:
    """The image bytes of the row groups last read; to another process it goes empty."""

    def __init__(self, files: tuple[str, ...], most: int) -> None:
        self.files, self.most = files, most
        self._process = os.getpid()
        self._open: OrderedDict[int, tuple[pq.ParquetFile, str]] = OrderedDict()
        self._read: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()

    def __call__(self, file: int, group: int) -> pa.Array:
        if os.getpid() != self._process:  # connections do not outlive a fork
            self._open.clear()
            self._process = os.getpid()
        key = file, group
        if key in self._read:
            self._read.move_to_end(key)
            return self._read[key]
        array = self._read_group(file, group)
        while len(self._read) >= self.most:
            self._read.popitem(last=False)
        self._read[key] = array
        return array

    def _read_group(self, file: int, group: int) -> pa.Array:
        if not is_remote(self.files[file]):
            return self._image_bytes(file, group)
        from localign.data.sources.remote import patiently

        def again() -> pa.Array:
            try:
                return self._image_bytes(file, group)
            except Exception:
                self._open.pop(file, None)  # the connection may be what is broken
                raise

        return patiently(again, f"row group {group} of {self.files[file]}")

    def _image_bytes(self, file: int, group: int) -> pa.Array:
        handle, column = self._handle(file)
        # One thread: a pool of them does not outlive the fork of a loader worker.
        table = handle.read_row_group(group, columns=[column], use_threads=False)
        array = table.column(0).combine_chunks()
        return array.field("bytes") if column.endswith(".bytes") else array

    def _handle(self, file: int) -> tuple[pq.ParquetFile, str]:
        if file not in self._open:
            while len(self._open) >= _MOST_OPEN:
                self._open.popitem(last=False)
            handle = open_parquet(self.files[file])
            self._open[file] = handle, image_column(handle, self.files[file])
        self._open.move_to_end(file)
        return self._open[file]

    def __reduce__(self) -> tuple[type[_Groups], tuple[Any, ...]]:
        return _Groups, (self.files, self.most)


def _row_groups_of_all(files: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Rows and image bytes of each row group of each file."""
    if not is_remote(files[0]):
        return [_row_groups(file) for file in files]
    from localign.data.sources.remote import at_once

    return at_once(_row_groups, files)


def _row_groups(file: str) -> list[tuple[int, int]]:
    handle = open_parquet(file)
    metadata = handle.metadata
    place = _leaf(metadata, image_column(handle, file))
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    return [(group.num_rows, group.column(place).total_uncompressed_size) for group in groups]


def open_parquet(file: str) -> pq.ParquetFile:
    """A file to read from, by path or address.

    Raises:
        UserError: pyarrow is not installed, or this is no parquet file.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("reading parquet takes pyarrow: pip install 'localign[parquet]'") from None
    try:
        if is_remote(file):
            from localign.data.sources.remote import opened

            return pq.ParquetFile(opened(file))
        return pq.ParquetFile(file, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise UserError(f"cannot read {file} as parquet: {reason}") from None


def image_column(handle: pq.ParquetFile, file: str) -> str:
    """The column of image bytes: ``image.bytes``, ``image``, or another of that kind where there is one alone.

    Raises:
        UserError: There is none, or more than one and none is called image.
    """
    import pyarrow as pa

    def binary(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = {}
    schema = handle.schema_arrow
    for column in schema:
        if binary(column.type):
            found[column.name] = column.name
        elif pa.types.is_struct(column.type):
            at = column.type.get_field_index("bytes")
            if at >= 0 and binary(column.type.field(at).type):
                found[column.name] = f"{column.name}.bytes"
    if "image" in found:
        return found["image"]
    if len(found) == 1:
        return next(iter(found.values()))
    raise UserError(
        f"{file} has no column of image bytes called 'image'; its columns are {', '.join(schema.names)}"
    )


def _leaf(metadata: Any, column: str) -> int:
    """The number of a column among those that are stored."""
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)


def labels_column(files: Sequence[str]) -> tuple[list[str], NDArray[np.int64]] | None:
    """Class names and the class of each row, from the column ``label``; None where there is none.

    Raises:
        UserError: A row has no label.
    """
    names: list[str] | None = None
    parts = []
    for path in files:
        handle = open_parquet(path)
        if "label" not in handle.schema_arrow.names:
            return None
        parts.append(handle.read(columns=["label"], use_threads=False).column(0).to_pylist())
        names = names or _class_names(handle.schema_arrow.metadata)
    values = [value for part in parts for value in part]
    if None in values:
        raise UserError(f"{_named(files)}: row {values.index(None)} has no label")
    if names and all(isinstance(v, int) and 0 <= v < len(names) for v in values):
        return names, np.array(values)
    classes = sorted(set(values))
    place = {value: number for number, value in enumerate(classes)}
    return [str(name) for name in classes], np.array([place[value] for value in values])


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """What the labels' numbers stand for, as the library `datasets` writes it into a file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _named(files: Sequence[str]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} others"
