"""`localign data shard`: packs any source into tar shards."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from localign.data.classification import ClassLabels, labels_of
from localign.data.image_source import ImageSource
from localign.data.sources import ExcludingSource, FileListSource, ParquetSource, TarSource
from localign.datatools.packing import (
    ABOUT,
    QUALITY,
    About,
    Facts,
    Packing,
    check_same_files,
    facts_of,
    output_folders,
    pack,
    publish,
    show_packed,
)
from localign.datatools.reading import open_files
from localign.errors import UserError
from localign.options.datatools import ShardConfig
from localign.text.printing import printable
from localign.text.reading import read_json_object


def run_shard(config: ShardConfig) -> None:
    """Pack a source into tar shards, and print a summary.

    Raises:
        UserError: As :func:`write_shards` does.
        RunFailure: A worker process died.
    """
    show_packed(write_shards(config), Path(config.out))


def write_shards(config: ShardConfig) -> About:
    """Pack a source into tar shards; returns the content of ``about.json``.

    Raises:
        UserError: The source does not exist, or the output folder exists and holds something else.
        RunFailure: A worker process died.
    """
    source = open_files(config, config.exclude)
    final, temporary = output_folders(config.out)
    facts = facts_of(source, config)
    if final.exists():
        check_same_files(final, source)
        return read_about(final, facts)
    order = source.stream(config.seed, config.shuffle).indices(0, len(source))
    packing = Packing(
        source,
        order,
        _class_folders(source, config.source, order),
        config.shard_images,
        config.resize,
        config.quality or QUALITY,
        temporary,
    )
    about = pack(packing, config.processes, facts)
    publish(temporary, final)
    return about


def read_about(folder: Path, facts: Facts) -> About:
    """Read ``about.json`` of a finished folder.

    Raises:
        UserError: The folder was not packed from the same facts.
    """
    about: Mapping[str, Any] = {}
    with suppress(UserError):
        about = read_json_object(folder / ABOUT)
    if any(about.get(name) != value for name, value in facts.items()):
        raise UserError(f"{printable(folder)} already exists and holds something else; give another folder")
    return cast(About, about)


def _class_folders(source: ImageSource, spec: str, order: NDArray[np.int64]) -> list[str] | None:
    """The class of each image of a list, of parquet files or of samples with labels, as folders in the shards; else
    None."""
    inner = source.source if isinstance(source, ExcludingSource) else source
    with_labels = isinstance(inner, TarSource) and inner.index.labels is not None
    if not with_labels and not isinstance(inner, FileListSource | ParquetSource):
        return None
    try:
        labels = labels_of(source, spec)
    except UserError as error:
        print(f"classes    none: {error}", file=sys.stderr)
        return None
    assert isinstance(labels, ClassLabels)
    return [labels.classes[code].replace("/", "_") for code in labels.codes[order]]
