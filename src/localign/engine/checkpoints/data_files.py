"""Notices that the files of a run's data changed between its start and a resume.

At its start a run saves the size and the modification time of each file, and a hash of some of them, in ``data.npz`` of
its folder. A file of another size has changed. A file of the same size with another time is compared by its hash, if it
has one. Copies of data often have new times: if nearly all files have other times and all hashed files are equal, the
data count as copied, not as changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localign.engine.distributed import DistributedContext
from localign.engine.log import say
from localign.engine.task import Task
from localign.errors import UserError
from localign.files import replacing
from localign.files.disk import writing
from localign.options.train import TrainConfig
from localign.text.printing import printable

DATA_FILE = "data.npz"
MAX_HASHED = 4096
"""Files that are hashed, at even distances."""
HASHED_BYTES = 2**28
"""Bytes that are hashed in all of them together: larger files are hashed in blocks at even distances."""
COPIED_SHARE = 0.9
"""Share of files with other times from which data count as copied."""

_BLOCK = 2**16
_THREADS = 8
_SHOWN = 3
_HASH_BYTES = 16


@dataclass(frozen=True)
class DataFiles:
    """The states of a run's data files.

    Attributes:
        names: The files' names in their sources.
        sizes: int64 ``(files,)``, bytes; -1 for a file that cannot be read.
        times: int64 ``(files,)``, modification times, nanoseconds.
        hashed: int64 ``(hashed,)``, indices of the hashed files.
        hashes: uint8 ``(hashed, 16)``.
        limit: Bytes that are hashed in each file.
    """

    names: Sequence[str]
    sizes: NDArray[np.int64]
    times: NDArray[np.int64]
    hashed: NDArray[np.int64]
    hashes: NDArray[np.uint8]
    limit: int


def _states(paths: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    def state(path: str) -> tuple[int, int]:
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            return -1, 0
        return found.st_size, found.st_mtime_ns

    parts = [paths[begin : begin + 1000] for begin in range(0, len(paths), 1000)]
    with ThreadPoolExecutor(_THREADS) as threads:  # a network file system answers many questions at a time
        found = [pair for part in threads.map(lambda part: [state(p) for p in part], parts) for pair in part]
    table = np.array(found, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _hash(path: str, limit: int) -> bytes:
    """A hash of a file of at most ``limit`` bytes, or of blocks of a larger file."""
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            count = max(1, limit // _BLOCK)
            begins = (
                range(0, size, _BLOCK)
                if size <= limit
                else [(size - _BLOCK) * n // count for n in range(count + 1)]
            )
            for begin in begins:
                file.seek(begin)
                digest.update(file.read(_BLOCK))
    except (OSError, ValueError):
        return bytes(_HASH_BYTES)
    return digest.digest()


def _hashes(paths: Sequence[str], limit: int) -> NDArray[np.uint8]:
    with ThreadPoolExecutor(_THREADS) as threads:
        joined = b"".join(threads.map(lambda path: _hash(path, limit), paths))
    return np.frombuffer(joined, np.uint8).reshape(-1, _HASH_BYTES)


def read_states(files: Iterable[tuple[str, str]]) -> DataFiles:
    """The states of (name, path) files."""
    pairs = list(files)
    paths = [path for _, path in pairs]
    sizes, times = _states(paths)
    count = min(len(paths), MAX_HASHED)
    hashed = np.arange(count, dtype=np.int64) * len(paths) // max(count, 1)
    limit = max(_BLOCK, HASHED_BYTES // max(count, 1))
    hashes = _hashes([paths[i] for i in hashed], limit)
    return DataFiles([name for name, _ in pairs], sizes, times, hashed, hashes, limit)


def save_data_files(folder: Path, task: Task, context: DistributedContext) -> None:
    """Save the states of a task's data files in a run folder, if the task has such files. A call of all ranks.

    Raises:
        RunFailure: The file system raised an error.
    """
    with context.raise_on_all_ranks():
        if context.is_main:
            _save_states(folder, list(task.data_files()))


def _save_states(folder: Path, pairs: list[tuple[str, str]]) -> None:
    if pairs:
        with writing(folder):
            save(folder, read_states(pairs))


def save(folder: Path, files: DataFiles) -> None:
    """Write ``data.npz`` of a folder. Raises OSError."""
    names = zlib.compress(json.dumps(files.names).encode(), 1)
    about = {"limit": files.limit}
    with replacing(folder / DATA_FILE) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            names=np.frombuffer(names, np.uint8),
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            sizes=files.sizes,
            times=files.times,
            hashed=files.hashed,
            hashes=files.hashes,
        )


def load(folder: Path) -> DataFiles | None:
    """Read ``data.npz`` of a run folder; None if an older version wrote none.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / DATA_FILE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names: Any = json.loads(zlib.decompress(arrays["names"].tobytes()))
            sizes, times, hashed, hashes = (arrays[key] for key in ("sizes", "times", "hashed", "hashes"))
            limit = json.loads(arrays["about"].tobytes())["limit"]
        count = len(names)
        fits = sizes.shape == times.shape == (count,) and hashes.shape == (len(hashed), _HASH_BYTES)
        if not fits or (len(hashed) and not 0 <= hashed.min() <= hashed.max() < count):
            raise ValueError
        return DataFiles(names, sizes, times, hashed, hashes, int(limit))
    except FileNotFoundError:
        return None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        AttributeError,
        zlib.error,
        zipfile.BadZipFile,
    ):
        raise UserError(
            f"{printable(path)} is damaged, so changes of the data cannot be noticed; delete it to go on"
        ) from None


def differences(old: DataFiles, files: Iterable[tuple[str, str]]) -> list[str]:
    """Says which files differ, as parts of a line; [] if none does.

    Args:
        old: The saved states.
        files: (name, path) of the files as they are now.
    """
    now = dict(files)
    sizes, times = _states([now.get(name, "") for name in old.names])
    gone = [old.names[i] for i in np.flatnonzero((sizes < 0) & (old.sizes >= 0)).tolist()]
    new = sorted(now.keys() - set(old.names))
    same_name = np.fromiter((name in now for name in old.names), bool, len(old.names)) & (sizes >= 0)
    resized = same_name & (sizes != old.sizes) & (old.sizes >= 0)
    touched = same_name & (sizes == old.sizes) & (times != old.times)
    rewritten = _rewritten(old, now, touched)
    other_sizes = [
        f"{printable(old.names[i])}: {old.sizes[i]:,} bytes before, {sizes[i]:,} now"
        for i in np.flatnonzero(resized).tolist()
    ]
    changed = other_sizes + [f"{printable(old.names[i])}: other content" for i in rewritten]
    parts = []
    if changed:
        parts.append(f"{_count(len(changed), len(old.names))} changed ({_first(changed)})")
    if gone:
        parts.append(f"{_count(len(gone), len(old.names))} gone ({_first(map(printable, gone))})")
    if new:
        parts.append(f"{len(new):,} new ({_first(map(printable, new))})")
    return parts


def _rewritten(old: DataFiles, now: dict[str, str], touched: NDArray[np.bool_]) -> list[int]:
    """The files with another time whose content differs, or of which nobody knows."""
    if not touched.any():
        return []
    compared = [(place, int(i)) for place, i in enumerate(old.hashed) if touched[i]]
    found = _hashes([now[old.names[i]] for _, i in compared], old.limit)
    differ = [
        i
        for (place, i), digest in zip(compared, found, strict=True)
        if not np.array_equal(digest, old.hashes[place])
    ]
    copied = touched.sum() >= COPIED_SHARE * len(old.names)
    if copied and not differ and compared:
        return []
    known = {i for _, i in compared}
    return sorted({*differ, *(int(i) for i in np.flatnonzero(touched) if int(i) not in known)})


def _count(count: int, total: int) -> str:
    return f"{count:,} of {total:,} files"


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    return "; ".join(listed[:_SHOWN]) + ("; ..." if len(listed) > _SHOWN else "")


def check_same_data(
    folder: Path, old: dict[str, str], task: Task, config: TrainConfig, context: DistributedContext
) -> None:
    """Refuse to resume a run with other data or other starting weights. A call of all ranks.

    The data's state is saved if an older version saved none, or if ``accept_changed_data`` lets the run go on.

    Args:
        folder: The run folder.
        old: The task's fingerprint in the checkpoint.
        task: The task now.
        config: The run's config.
        context: All ranks of the run; the main one compares.

    Raises:
        UserError: Fingerprints or files differ; the line names them.
        RunFailure: The file system raised an error.
    """
    with context.raise_on_all_ranks():
        if context.is_main:
            _check(folder, old, task.fingerprint(), list(task.data_files()), config.accept_changed_data)


def _check(
    folder: Path, old: dict[str, str], new: dict[str, str], pairs: list[tuple[str, str]], accept: bool
) -> None:
    try:
        saved = load(folder)
    except UserError:
        if not accept:
            raise
        saved = None
    changed = {name for name in {*old, *new} if old.get(name) != new.get(name)}
    parts = (
        differences(saved, pairs) if saved is not None and pairs else []
    )  # no pairs: the data are remote now
    if parts:
        changed.add("data")
    refused = changed - {"data", "labels"} if accept else changed
    if refused:
        details = f" ({'; '.join(parts)})" if parts else ""
        remedy = (
            "; --accept-changed-data goes on with the data as they are now"
            if refused & {"data", "labels"}
            else ""
        )
        listed = ", ".join(sorted(refused))
        raise UserError(
            f"cannot resume {printable(folder)}{details}{remedy}: changed since the run started: {listed}"
        )
    if changed:
        say(
            f"the data changed since the run started{': ' + '; '.join(parts) if parts else ''}; going on with them"
        )
    if saved is None or changed:
        _save_states(folder, pairs)
