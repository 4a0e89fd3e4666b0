"""The records of shards that ``localign data shard`` wrote, in the file ``shards.jsonl`` beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypedDict, cast

SHARDS = "shards.jsonl"


class ShardRecord(TypedDict):
    """A line of ``shards.jsonl``."""

    shard: str
    """File name."""
    images: int
    bytes: int
    """Size of the file."""
    sha256: str
    left_out: list[tuple[str, str]]
    """(name, reason) of the unreadable images."""


def shard_records(folder: Path) -> list[ShardRecord]:
    """The records in a folder; incomplete lines are skipped. [] for a folder without records."""
    records = []
    with suppress(OSError, UnicodeDecodeError):
        for line in (folder / SHARDS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and record.keys() >= ShardRecord.__annotations__.keys():
                    records.append(cast(ShardRecord, record))
    return records


def are_packed(shards: Sequence[Path], sizes: Sequence[int]) -> bool:
    """Whether ``localign data shard`` wrote all shards, so that every file in them is an image of its own."""
    known = {
        folder: {record["shard"]: record["bytes"] for record in shard_records(folder)}
        for folder in {path.parent for path in shards}
    }
    return all(known[path.parent].get(path.name) == size for path, size in zip(shards, sizes, strict=True))
