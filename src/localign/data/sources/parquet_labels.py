"""Labels of the rows of parquet files, from the column ``label``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from localign.data.sources.lists import label_text
from localign.data.sources.parquet import open_parquet, shortened_files
from localign.errors import UserError
from localign.text.printing import first_line, printable

if TYPE_CHECKING:
    import pyarrow as pa

MAX_LABEL_BYTES = 2**28
"""Bytes of the distinct labels of a file. Larger columns hold texts."""


def labels_column(files: Sequence[str]) -> tuple[list[str], NDArray[np.int64]] | None:
    """Class names, and each row's class as an index into them, from the column ``label``; None without it.

    Raises:
        UserError: A row has no label, or labels are lists, structures or long texts.
    """
    names: list[str] | None = None
    distinct: dict[Any, int] = {}
    parts = []
    begin = 0
    for file in files:
        handle = open_parquet(file)
        if "label" not in handle.schema_arrow.names:
            return None
        names = names or _class_names(handle.schema_arrow.metadata)
        values, codes = _encoded(handle, file)
        if (codes < 0).any():
            row = begin + int(np.flatnonzero(codes < 0)[0])
            raise UserError(f"{printable(shortened_files(files))}: row {row} has no label")
        begin += len(codes)
        code_of = np.array([distinct.setdefault(value, len(distinct)) for value in values], np.int64)
        parts.append(code_of[codes])
    values, codes = list(distinct), np.concatenate(parts)
    if names and all(isinstance(v, int) and 0 <= v < len(names) for v in values):
        return names, np.array(values)[codes]
    try:
        order = sorted(range(len(values)), key=values.__getitem__)
    except TypeError:  # files with columns of different types
        order = sorted(range(len(values)), key=lambda n: str(values[n]))
    rank = np.empty(len(values), np.int64)
    rank[order] = np.arange(len(values))
    return [label_text(values[n]) for n in order], rank[codes]


def _encoded(handle: Any, file: str) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct labels of a file, and each row's label as an index into them, -1 where it is missing."""
    import pyarrow as pa

    kind = handle.schema_arrow.field("label").type
    if pa.types.is_nested(kind):
        raise UserError(f"the labels of {printable(file)} are of type {kind}; a label is a word or a number")
    if _is_text(kind):  # a dictionary is not expanded
        handle = open_parquet(file, dictionary=("label",))
    number = [handle.metadata.schema.column(i).path for i in range(handle.metadata.num_columns)].index(
        "label"
    )
    groups = (handle.metadata.row_group(g) for g in range(handle.metadata.num_row_groups))
    if sum(group.column(number).total_uncompressed_size for group in groups) > MAX_LABEL_BYTES:
        raise UserError(f"the column label of {printable(file)} is too large to hold labels of classes")
    try:
        column = handle.read(columns=["label"], use_threads=False).column(0)
        encoded = pa.types.is_dictionary(column.type)
        return _with_codes(
            (column.unify_dictionaries() if encoded else column.dictionary_encode()).combine_chunks()
        )
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read the labels of {printable(file)}: {first_line(error)}") from None


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    return any(check(kind) for check in (types.is_string, types.is_large_string, types.is_binary))


def _with_codes(column: pa.DictionaryArray | pa.ChunkedArray) -> tuple[list[Any], NDArray[np.int64]]:
    chunks = column.chunks if hasattr(column, "chunks") else [column]
    values: list[Any] = chunks[0].dictionary.to_pylist() if chunks else []
    codes = [chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) for chunk in chunks]
    joined = np.concatenate(codes) if codes else np.empty(0, np.int64)
    missing = np.array([label_text(value) == "" for value in values], dtype=bool)
    if missing.any():
        joined = np.where((joined >= 0) & missing[joined], -1, joined)
    return [None if gone else value for value, gone in zip(values, missing, strict=True)], joined


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """The class names that the library `datasets` writes into a file, or None."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
