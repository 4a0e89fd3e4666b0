"""Images in the rows of parquet files, the format of data sets on the Hugging Face hub."""

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
"""Bytes of row groups that each loader worker caches, at most."""
MAX_CACHED_GROUPS = 16
MAX_GROUP_BYTES = 2**31
"""Larger row groups are refused, because a row group is read as a whole."""
_MAX_OPEN_FILES = 16


class ParquetSource(EncodedSource):
    """The rows of parquet files that have a column ``image`` of ``{bytes, path}`` or of bytes.

    A row group is read as a whole. A :class:`localign.data.stream.BlockStream` therefore shuffles the images within
    as many row groups as the cache holds. An image's name is its file and row, ``x.parquet:17``.

    Args:
        files: Paths, or URLs that fsspec knows.
        image_size: As for ``FolderSource``.

    Attributes:
        files: The files.
        blocks: int64, the number of rows of each row group.
        window: Number of row groups in the cache.

    Raises:
        UserError: pyarrow is not installed; a file is missing, damaged or has no image column; or a row group is
            too large.
    """

    kind = "parquet"
    blocks: NDArray[np.int64]

    def __init__(
        self, files: Sequence[str | os.PathLike[str]], image_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(image_size)
        self.files = tuple(str(file) for file in files)
        if not self.files:
            raise UserError("no parquet files to read")
        groups = [
            (file, group, rows, size)
            for file, sizes in enumerate(_all_row_groups(self.files))
            for group, (rows, size) in enumerate(sizes)
        ]
        self._groups: NDArray[np.int64] = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self.blocks = self._groups[:, 2]
        self._begins = np.cumsum(self.blocks) - self.blocks
        if not self.blocks.sum():
            raise UserError(f"no rows in {_shortened(self.files)}")
        largest = int(self._groups[:, 3].max())
        if largest > MAX_GROUP_BYTES:
            raise UserError(
                f"a row group of {_shortened(self.files)} has {largest / 2**30:.1f} GiB of images; the limit is "
                f"{MAX_GROUP_BYTES / 2**30:.0f} GiB: write smaller row groups, or tar shards"
            )
        self.window = max(1, min(MAX_CACHED_GROUPS, WINDOW_BYTES // max(largest, 1)))
        self._cache = _RowGroupCache(self.files, self.window)

    def __len__(self) -> int:
        return int(self.blocks.sum())

    @property
    def notice(self) -> str:
        """The order of shuffling, and the cost of remote files."""
        rows = int(self.blocks.max())
        cost = "each loader worker fetches every row group; " if is_remote(self.files[0]) else ""
        return cost + (
            f"parquet files are read by row groups of up to {rows} images and shuffled within {self.window} row "
            "groups at a time; a run resumes exactly at its sample; `localign data shard` makes tar shards, which "
            "are shuffled as a whole"
        )

    def name(self, index: int) -> str:
        """The file's name and the image's row in the file."""
        group = self._group_of(index)
        file = self._groups[group, 0]
        first = self._begins[np.searchsorted(self._groups[:, 0], file)]
        return f"{PurePosixPath(self.files[file]).name}:{index - first}"

    def encoded(self, index: int) -> bytes:
        name, group = self.name(index), self._group_of(index)
        file, group_in_file = (int(v) for v in self._groups[group, :2])
        with unreadable_on_failure(name, self.files[file]):
            data = self._cache(file, group_in_file)[index - int(self._begins[group])]
        if not data.is_valid:
            raise UnreadableImage(name, "the row has no image bytes")
        check_bytes(data.as_buffer().size, name)
        content: bytes = data.as_py()
        return content

    def _group_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return int(np.searchsorted(self._begins, index, side="right")) - 1

    def _digest(self, digest: hashlib.blake2b) -> None:
        names = [PurePosixPath(file).name for file in self.files]
        digest.update(json.dumps([names, self._groups.tolist()]).encode())


class _RowGroupCache:
    """The image bytes of the row groups read last. Pickling drops the content."""

    def __init__(self, files: tuple[str, ...], max_groups: int) -> None:
        self.files, self.max_groups = files, max_groups
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
        while len(self._read) >= self.max_groups:
            self._read.popitem(last=False)
        self._read[key] = array
        return array

    def _read_group(self, file: int, group: int) -> pa.Array:
        if not is_remote(self.files[file]):
            return self._image_bytes(file, group)
        from localign.data.sources.remote import with_retries

        def attempt() -> pa.Array:
            try:
                return self._image_bytes(file, group)
            except Exception:
                self._open.pop(file, None)  # the next attempt opens a new connection
                raise

        return with_retries(attempt, f"row group {group} of {self.files[file]}")

    def _image_bytes(self, file: int, group: int) -> pa.Array:
        handle, column = self._handle(file)
        # One thread, because a thread pool does not survive the fork of a loader worker.
        table = handle.read_row_group(group, columns=[column], use_threads=False)
        array = table.column(0).combine_chunks()
        return array.field("bytes") if column.endswith(".bytes") else array

    def _handle(self, file: int) -> tuple[pq.ParquetFile, str]:
        if file not in self._open:
            while len(self._open) >= _MAX_OPEN_FILES:
                self._open.popitem(last=False)
            handle = open_parquet(self.files[file])
            self._open[file] = handle, image_column(handle, self.files[file])
        self._open.move_to_end(file)
        return self._open[file]

    def __reduce__(self) -> tuple[type[_RowGroupCache], tuple[Any, ...]]:
        return _RowGroupCache, (self.files, self.max_groups)


def _all_row_groups(files: Sequence[str]) -> list[list[tuple[int, int]]]:
    """(rows, bytes of images) of each row group of each file."""
    if not is_remote(files[0]):
        return [_row_groups(file) for file in files]
    from localign.data.sources.remote import map_concurrently

    return map_concurrently(_row_groups, files)


def _row_groups(file: str) -> list[tuple[int, int]]:
    handle = open_parquet(file)
    metadata = handle.metadata
    column = _column_number(metadata, image_column(handle, file))
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    return [(group.num_rows, group.column(column).total_uncompressed_size) for group in groups]


def open_parquet(file: str) -> pq.ParquetFile:
    """Open a parquet file by its path or URL.

    Raises:
        UserError: pyarrow is not installed, or the file is missing or not a parquet file.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("reading parquet files requires pyarrow: pip install 'localign[parquet]'") from None
    try:
        if is_remote(file):
            from localign.data.sources.remote import open_remote

            return pq.ParquetFile(open_remote(file))
        return pq.ParquetFile(file, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        raise UserError(f"cannot read {file} as parquet: {reason}") from None


def image_column(handle: pq.ParquetFile, file: str) -> str:
    """The column of image bytes: ``image.bytes``, ``image``, or the only column of bytes or ``{bytes, ...}``.

    Raises:
        UserError: There is no such column, or several and none is called ``image``.
    """
    import pyarrow as pa

    def binary(kind: pa.DataType) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found: dict[str, str] = {}
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
        f"{file} has no column 'image' with image bytes; its columns are {', '.join(schema.names)}"
    )


def _column_number(metadata: Any, column: str) -> int:
    """The index of a column among the stored columns."""
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)


def labels_column(files: Sequence[str]) -> tuple[list[str], NDArray[np.int64]] | None:
    """Class names, and each row's class as an index into them, from the column ``label``; None without it.

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
        raise UserError(f"{_shortened(files)}: row {values.index(None)} has no label")
    if names and all(isinstance(v, int) and 0 <= v < len(names) for v in values):
        return names, np.array(values)
    classes = sorted(set(values))
    code_of = {value: code for code, value in enumerate(classes)}
    return [str(name) for name in classes], np.array([code_of[value] for value in values])


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """The class names that the library `datasets` writes into a file, or None."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _shortened(files: Sequence[str]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} others"
