"""`localign data shard`: any source into tar shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from localign.data.classification import ClassLabels, labels_of
from localign.data.sources import ExcludingSource, FileListSource, ImageSource, ParquetSource
from localign.data.stream import sample_stream
from localign.datatools.packing import (
    ABOUT,
    QUALITY,
    Packing,
    facts_of,
    pack,
    partial,
    put_whole,
    show_packed,
)
from localign.datatools.reading import open_files
from localign.errors import UserError
from localign.options.datatools import ShardConfig


def run_shard(config: ShardConfig) -> None:
    """Pack a source, and print what was packed.

    Raises:
        UserError: See :func:`write_shards`.
        RunFailure: A process died.
    """
    show_packed(write_shards(config), Path(config.out))


def write_shards(config: ShardConfig) -> dict[str, Any]:
    """Pack a source; returns what ``about.json`` says.

    Raises:
        UserError: The source does not exist, or the folder is there and holds something else.
        RunFailure: A process died.
    """
    source = open_files(config.source, config.exclude)
    final, temporary = partial(config.out)
    facts = facts_of(source, config)
    if final.exists():
        return finished(final, facts)
    order = sample_stream(source, config.seed, config.shuffle).indices(0, len(source))
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
    put_whole(temporary, final)
    return about


def finished(final: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """What is there already by the same command.

    Raises:
        UserError: It is something else.
    """
    try:
        about = json.loads((final / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = {}
    if any(about.get(name) != value for name, value in facts.items()):
        raise UserError(f"{final} is there already and holds something else; give another folder")
    return about


def _class_folders(source: ImageSource, spec: str, order: np.ndarray) -> list[str] | None:
    """Of a list or of parquet files with labels: the class of each image, for the shards to have class folders."""
    inner = source.source if isinstance(source, ExcludingSource) else source
    if not isinstance(inner, FileListSource | ParquetSource):
        return None
    try:
        labels = labels_of(source, spec)
    except UserError:
        return None
    assert isinstance(labels, ClassLabels)
    return [labels.classes[code].replace("/", "_") for code in labels.codes[order]]
