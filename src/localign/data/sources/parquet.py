"""Images in the rows of parquet files, the format of data sets on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from localign.data.decoding import UnreadableImage, check_bytes, unreadable_on_failure
from localign.data.sources.base import EncodedSource, is_remote
from localign.data.sources.layouts.identity import known_content, read_head, short_names
from localign.data.sources.layouts.parquet_pages import page_sizes
from localign.errors import RunFailure, UserError
from localign.text.printing import first_line, printable

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

WINDOW_BYTES = 2**28
"""Bytes of row groups that each loader worker caches, at most."""
MAX_CACHED_GROUPS = 16
MAX_GROUP_BYTES = 2**31
"""Larger row groups are refused, because a row group is read as a whole."""
_MAX_OPEN_FILES = 16
_MIN_ROWS = 2**20
"""A file that claims more rows than this, and more than it has bytes, is damaged."""


class ParquetSource(EncodedSource):
    """The rows of parquet files that have a column ``image`` of ``{bytes, path}`` or of bytes.

    A row group is read as a whole. A :class:`localign.data.stream.BlockStream` therefore shuffles the images within
    as many row groups as the cache holds. An image's name is its file and row, ``x.parquet:17``.

    Args:
        files: Paths, or URLs that fsspec knows.
        image_size: As for ``FolderSource``.
        fields: The columns that may hold images, the first that the files have; () for the usual one.
        max_group_bytes: Bytes that a row group may take in memory; default :data:`MAX_GROUP_BYTES`.

    Attributes:
        files: The files.
        blocks: int64, the number of rows of each row group.
        window: Number of row groups in the cache.

    Raises:
        UserError: pyarrow is not installed; a file is missing, damaged or has no image column; or a row group is
            too large.
        RunFailure: On reading, a row group would take more memory than ``max_group_bytes``.
    """

    kind = "parquet"
    blocks: NDArray[np.int64]

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        image_size: tuple[int, int] | None = None,
        fields: tuple[str, ...] = (),
        max_group_bytes: int | None = None,
    ) -> None:
        super().__init__(image_size)
        limit = MAX_GROUP_BYTES if max_group_bytes is None else max_group_bytes
        self.files = tuple(str(file) for file in files)
        if not self.files:
            raise UserError("no parquet files to read")
        groups = [
            (file, group, rows, size)
            for file, sizes in enumerate(_all_row_groups(self.files, fields))
            for group, (rows, size) in enumerate(sizes)
        ]
        self._groups: NDArray[np.int64] = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self.blocks = self._groups[:, 2]
        self._begins = np.cumsum(self.blocks) - self.blocks
        if not self.blocks.sum():
            raise UserError(f"no rows in {shortened_files(self.files)}")
        largest = int(self._groups[:, 3].max())
        if largest > limit:
            raise UserError(
                f"a row group of {shortened_files(self.files)} has {largest / 2**30:.1f} GiB of images; the limit is "
                f"{limit / 2**30:.3g} GiB: write smaller row groups, or tar shards, or raise --max-row-group-gib"
            )
        self.window = max(1, min(MAX_CACHED_GROUPS, WINDOW_BYTES // max(largest, 1)))
        self._names = short_names(self.files)
        self._cache = _RowGroupCache(self.files, self.window, fields, limit)

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
        return f"{self._names[file]}:{index - first}"

    def encoded(self, index: int) -> bytes:
        name, group = self.name(index), self._group_of(index)
        file, group_in_file = (int(v) for v in self._groups[group, :2])
        with unreadable_on_failure(name, self.files[file]):
            data = self._cache(file, group_in_file)[index - int(self._begins[group])]
        if data.is_valid and hasattr(data, "dictionary"):
            data = data.value
        if not data.is_valid:
            raise UnreadableImage(name, "the row has no image bytes")
        check_bytes(data.as_buffer().size, name)
        content: bytes = data.as_py()
        return content

    def _group_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return int(np.searchsorted(self._begins, index, side="right")) - 1

    def data_files(self) -> Iterator[tuple[str, str]]:
        if is_remote(self.files[0]):
            return iter(())
        return zip(self._names, self.files, strict=True)

    def _digest(self, digest: hashlib.blake2b) -> None:
        names = [PurePosixPath(file).name for file in self.files]
        digest.update(json.dumps([names, self._groups.tolist()]).encode())


class _RowGroupCache:
    """The image bytes of the row groups read last. Pickling drops the content."""

    def __init__(
        self, files: tuple[str, ...], max_groups: int, fields: tuple[str, ...], max_bytes: int
    ) -> None:
        self.files, self.max_groups, self.fields, self.max_bytes = files, max_groups, fields, max_bytes
        self._process = os.getpid()
        self._open: OrderedDict[int, tuple[pq.ParquetFile, Column]] = OrderedDict()
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
        if not is_remote(self.files[file]) and self._repeats(handle, file, group, column):
            handle = open_parquet(self.files[file], dictionary=(column.path,))
        # One thread, because a thread pool does not survive the fork of a loader worker.
        table = handle.read_row_group(group, columns=[column.path], use_threads=False)
        array = table.column(0).combine_chunks()
        return array.field("bytes") if column.in_struct else array

    def _repeats(self, handle: pq.ParquetFile, file: int, group: int, column: Column) -> bool:
        """Whether images are to be kept once and not as often as they occur. Checks the memory for reading them.

        Raises:
            RunFailure: The row group takes more than ``max_bytes``.
        """
        metadata = handle.metadata
        chunk = metadata.row_group(group).column(_column_number(metadata, column.path))
        begin = chunk.data_page_offset
        if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < begin:
            begin = chunk.dictionary_page_offset
        with open(self.files[file], "rb") as content:
            sizes = page_sizes(
                lambda at, size: os.pread(content.fileno(), size, at), begin, chunk.total_compressed_size
            )
        if max(sizes.stored, 4 * sizes.values) > self.max_bytes:
            raise RunFailure(
                f"row group {group} of {printable(self.files[file])} takes {sizes.stored / 2**30:.1f} GiB; the limit "
                f"is {self.max_bytes / 2**30:.3g} GiB: write smaller row groups, or raise --max-row-group-gib"
            )
        return sizes.expanded > self.max_bytes

    def _handle(self, file: int) -> tuple[pq.ParquetFile, Column]:
        if file not in self._open:
            while len(self._open) >= _MAX_OPEN_FILES:
                self._open.popitem(last=False)
            handle = open_parquet(self.files[file])
            self._open[file] = handle, image_column(handle, self.files[file], self.fields)
        self._open.move_to_end(file)
        return self._open[file]

    def __reduce__(self) -> tuple[type[_RowGroupCache], tuple[Any, ...]]:
        return _RowGroupCache, (self.files, self.max_groups, self.fields, self.max_bytes)


class Column(NamedTuple):
    """A column of image bytes."""

    path: str
    """Its path among the stored columns."""
    in_struct: bool
    """Whether it is the field ``bytes`` of a structure."""


def _all_row_groups(files: Sequence[str], fields: tuple[str, ...]) -> list[list[tuple[int, int]]]:
    """(rows, bytes of images) of each row group of each file."""
    if not is_remote(files[0]):
        return [_row_groups(file, fields) for file in files]
    from localign.data.sources.remote import map_concurrently

    return map_concurrently(lambda file: _row_groups(file, fields), files)


def _row_groups(file: str, fields: tuple[str, ...]) -> list[tuple[int, int]]:
    handle = open_parquet(file)
    metadata = handle.metadata
    column = _column_number(metadata, image_column(handle, file, fields).path)
    groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
    sizes = [(group.num_rows, group.column(column).total_uncompressed_size) for group in groups]
    rows, stored = sum(rows for rows, _ in sizes), sum(g.column(column).total_compressed_size for g in groups)
    if any(min(pair) < 0 for pair in sizes) or rows > _MIN_ROWS + stored:
        raise UserError(f"{printable(file)} is damaged: it claims {rows:,} images in {stored:,} bytes")
    return sizes


def open_parquet(file: str, dictionary: Sequence[str] = ()) -> pq.ParquetFile:
    """Open a parquet file by its path or URL.

    Args:
        file: The path or URL.
        dictionary: Columns whose repeated values are kept once.

    Raises:
        UserError: pyarrow is not installed, or the file is missing or not a parquet file.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("reading parquet files requires pyarrow: pip install 'localign[parquet]'") from None
    shown = printable(file)
    try:
        if is_remote(file):
            from localign.data.sources.remote import open_remote

            return pq.ParquetFile(open_remote(file), read_dictionary=list(dictionary))
        _check_content(file)
        return pq.ParquetFile(file, memory_map=True, read_dictionary=list(dictionary))
    except (UserError, RunFailure, MemoryError):
        raise
    except Exception as error:  # a damaged footer raises errors of several kinds
        reason = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise UserError(f"cannot read {shown} as parquet: {reason}") from None


def _check_content(file: str) -> None:
    """Raises UserError for a file that is known to be something else. Raises OSError."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise UserError(f"cannot read {printable(file)} as parquet: it is a folder or a special file")
    what = known_content(read_head(file), "parquet")
    if what is not None:
        raise UserError(f"cannot read {printable(file)} as parquet: it is {what}")


def image_column(handle: pq.ParquetFile, file: str, fields: tuple[str, ...] = ()) -> Column:
    """The column of image bytes: ``image.bytes``, ``image``, or the only column of bytes or ``{bytes, ...}``.

    Args:
        handle: The open file.
        file: Its name, for errors.
        fields: Names of columns; the first that holds image bytes is taken. () for the usual one.

    Raises:
        UserError: There is no such column, or several and none is called ``image``.
    """
    import pyarrow as pa

    def binary(kind: pa.DataType) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found: dict[str, Column] = {}
    schema = handle.schema_arrow
    for column in schema:
        if binary(column.type):
            found[column.name] = Column(column.name, False)
        elif pa.types.is_struct(column.type):
            at = column.type.get_field_index("bytes")
            if at >= 0 and binary(column.type.field(at).type):
                found[column.name] = Column(f"{column.name}.bytes", True)
    if fields:
        by_name = {name.lower(): column for name, column in found.items()}
        chosen = next((by_name[name] for name in fields if name in by_name), None)
        if chosen is not None:
            return chosen
        raise UserError(
            f"{printable(file)} has no column {' or '.join(map(printable, fields))} with image bytes; its columns are "
            f"{printable(', '.join(schema.names))}"
        )
    if "image" in found:
        return found["image"]
    if len(found) == 1:
        return next(iter(found.values()))
    several = "; --field chooses a column" if found else ""
    raise UserError(
        f"{printable(file)} has no column 'image' with image bytes; its columns are "
        f"{printable(', '.join(schema.names))}{several}"
    )


def _column_number(metadata: Any, column: str) -> int:
    """The index of a column among the stored columns."""
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)


def shortened_files(files: Sequence[str]) -> str:
    """The first file, and the number of others."""
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} others"
