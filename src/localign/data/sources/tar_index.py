"""The index of tar shards: the offset and size of each image, found once and cached in a folder of three files.

``records.npy`` and ``names.npy`` are memory-mapped, so all ranks and loader workers of a machine share them.
``index.json`` identifies the shards. Nothing is unpickled; an index that does not match its shards is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from localign.data.sources.base import SUFFIXES, Names
from localign.errors import UserError
from localign.files import replacing, replacing_folder

OFFSET, SIZE, SHARD = 0, 1, 2
"""Columns of ``TarIndex.records``."""

Problems = tuple[tuple[str, str], ...]
Contents = tuple[NDArray[np.int64], Names, Problems]
"""Records, names and problems; see :class:`TarIndex`."""
State = tuple[int, int]
"""Size in bytes and modification time in nanoseconds of a shard."""

PORTABLE = "index.npz"
_VERSION = 1
_THREADS = 8
_ANNOUNCE_FROM = 16
_HEADER = 512


@dataclass
class Scan:
    """The images of one shard."""

    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    """(offset, size) of each image, bytes."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of members that look like images but are not, or of the shard itself."""


class TarIndex:
    """All images of a sequence of shards, in order.

    Args:
        records: int64 ``(images, 3)``: offset in bytes, size in bytes, and the shard's number.
        names: Names of the images.
        problems: (name, reason) of members and shards that cannot be read.
        folder: The folder of the index; None if it is in memory only.
    """

    def __init__(
        self,
        records: NDArray[np.int64],
        names: Names,
        problems: Problems,
        folder: Path | None = None,
    ) -> None:
        self.records, self.names, self.problems, self.folder = records, names, problems, folder

    def __len__(self) -> int:
        return len(self.records)

    def __reduce__(self) -> tuple[Callable[..., TarIndex], tuple[Any, ...]]:
        """Pickle the folder instead of the arrays, if there is a folder."""
        if self.folder is None:
            return TarIndex, (self.records, self.names, self.problems)
        return _load, (self.folder, int(self.records[:, SHARD].max()) + 1)


def scan_shard(file: IO[bytes], shard: str) -> Scan:
    """Read the headers of a tar file.

    Args:
        file: A seekable file.
        shard: The name of the shard in problems and errors.

    Raises:
        UserError: The file is not an uncompressed tar file, or a member's name leads out of it.
    """
    scan, end = Scan(), 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all members in memory
                if tar.offset <= end:
                    raise tarfile.ReadError("a header that leads backwards")
                end = tar.offset
                _add_member(scan, member, shard)
            end = tar.offset
        file.seek(end)
        if file.read(_HEADER).strip(b"\0"):
            raise tarfile.ReadError("no header")
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if not scan.names:
            raise UserError(
                f"{shard} is not a readable tar file ({error}); shards must be uncompressed"
            ) from None
        scan.problems.append((shard, f"damaged or truncated after {len(scan.names)} images: {error}"))
    return scan


def _add_member(scan: Scan, member: tarfile.TarInfo, shard: str) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{shard} is refused: the name of its member {member.name!r} leads out of the shard")
    if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
        return
    if member.isreg() and not member.issparse():
        scan.names.append(str(path))
        scan.places.append((member.offset_data, member.size))
    elif not member.isdir():
        scan.problems.append((str(path), f"a link in {shard}, not a file"))


def tar_index(shards: Sequence[Path]) -> TarIndex:
    """The index of local shards, built if it is missing or does not match the shards.

    It is cached in the folder of the first shard, or in the user's cache folder if that folder is read-only.

    Raises:
        UserError: A shard is missing or not a tar file, a member's name leads out of its shard, or the shards hold
            no images.
    """
    states = [_state(path) for path in shards]
    names = [path.name for path in shards]
    return cached_index(names, states, list(_index_folders(shards)), lambda: join_scans(_scan_all(shards)))


def cached_index(
    shards: Sequence[str], states: Sequence[State], folders: Sequence[Path], make: Callable[[], Contents]
) -> TarIndex:
    """Load an index from one of several folders, or build it and save it in the first writable folder.

    Args:
        shards: Names of the shards.
        states: States of the shards; an index of shards in another state is rebuilt.
        folders: Folders in which the index may lie.
        make: Builds the index.
    """
    digest = shards_digest(shards, states)
    for folder in folders:
        if (index := _load_if_current(folder, digest, len(shards))) is not None:
            return index
    records, names, problems = make()
    for folder in folders:
        if write_index(folder, digest, records, names, problems):
            index = _load_if_current(folder, digest, len(shards))
            if index is not None:
                return index
    return TarIndex(records, names, problems)


def shards_digest(names: Sequence[str], states: Sequence[State]) -> str:
    """A hash of the names and states of shards, which identifies the index of these shards."""
    content = json.dumps([[name, *state] for name, state in zip(names, states, strict=True)])
    return hashlib.blake2b(f"{_VERSION}|{content}".encode(), digest_size=16).hexdigest()


def _state(path: Path) -> State:
    """The state of a shard; a shard is indexed again when its state changes."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def _index_folders(shards: Sequence[Path]) -> Iterator[Path]:
    """The folders in which the index of these shards may lie."""
    key = hashlib.blake2b(os.fsencode("|".join(p.name for p in shards)), digest_size=6).hexdigest()
    yield shards[0].absolute().parent / f".localign-index-{key}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    full = hashlib.blake2b(
        os.fsencode("|".join(str(p.absolute()) for p in shards)), digest_size=12
    ).hexdigest()
    yield cache / "localign" / "tar-index" / full


def _scan_all(shards: Sequence[Path]) -> Iterator[Scan]:
    if len(shards) >= _ANNOUNCE_FROM:
        print(f"indexing {len(shards)} shards (needed once)", file=sys.stderr)

    def scan(path: Path) -> Scan:
        try:
            with open(path, "rb") as file:
                return scan_shard(file, path.name)
        except OSError as error:
            raise UserError(f"cannot read the shard {path}: {error.strerror}") from None

    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(scan, shards)


def join_scans(scans: Iterable[Scan]) -> Contents:
    """The records, names and problems of several scans, concatenated.

    Raises:
        UserError: The shards hold no images.
    """
    records, names, problems = [], [], []
    for number, scan in enumerate(
        scans
    ):  # into arrays one by one: lists of millions of names fill the memory
        places = np.array(scan.places, dtype=np.int64).reshape(-1, 2)
        records.append(np.column_stack([places, np.full(len(places), number)]))
        names.append(Names.of(scan.names))
        problems += scan.problems
    table = np.concatenate(records)
    if not len(table):
        raise UserError(
            f"the {len(records)} shards hold no images" if len(records) > 1 else "the shard holds no images"
        )
    return table, Names.joined(names), tuple(problems)


def write_index(
    folder: Path, digest: str, records: NDArray[np.int64], names: Names, problems: Sequence[tuple[str, str]]
) -> bool:
    """Save an index. Returns False if the folder cannot be written, or if another process is writing it."""
    try:
        with replacing_folder(folder) as temporary:
            np.save(temporary / "records.npy", np.column_stack([records, names.ends]))
            np.save(temporary / "names.npy", names.block)
            about = {"version": _VERSION, "digest": digest, "problems": list(problems)}
            (temporary / "index.json").write_text(json.dumps(about), encoding="utf-8")
    except OSError:
        return False
    return True


def write_portable(folder: Path, index: TarIndex, shards: Sequence[Path]) -> None:
    """Write an index into one file, ``index.npz``, for shards that will be read remotely."""
    states = [(path.stat().st_size, 0) for path in shards]  # uploads change the modification times
    about = {"digest": shards_digest([p.name for p in shards], states), "problems": list(index.problems)}
    with replacing(folder / PORTABLE) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            records=np.column_stack([index.records, index.names.ends]),
            names=index.names.block,
        )


def _load_if_current(folder: Path, digest: str, shards: int) -> TarIndex | None:
    try:
        if json.loads((folder / "index.json").read_text(encoding="utf-8"))["digest"] != digest:
            return None
        return _load(folder, shards)
    except (OSError, ValueError, KeyError, TypeError, EOFError, IndexError, RecursionError):
        return None  # missing or damaged: the index is rebuilt


def _load(folder: Path, shards: int) -> TarIndex:
    about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    table = np.load(folder / "records.npy", mmap_mode="r", allow_pickle=False)
    block = np.load(folder / "names.npy", mmap_mode="r", allow_pickle=False)
    return index_from_arrays(table, block, about["problems"], shards, folder)


def index_from_arrays(
    table: NDArray[Any], block: NDArray[Any], problems: Any, shards: int, folder: Path | None = None
) -> TarIndex:
    """Rebuild an index of ``shards`` shards from its arrays. Raises ValueError if they are not a valid index."""
    if table.ndim != 2 or table.shape[1] != 4 or table.dtype != np.int64 or block.dtype != np.uint8:
        raise ValueError("not an index of shards")
    offsets, sizes, numbers, ends = table.T
    valid = (
        len(table) > 0
        and 0 <= numbers.min() <= numbers.max() < shards
        and offsets.min() >= 0 <= sizes.min()
        and ends[0] >= 0 <= np.diff(ends).min(initial=0)
        and ends[-1] == len(block)
    )
    if not valid:
        raise ValueError("a damaged index of shards")
    pairs = tuple((str(name), str(reason)) for name, reason in problems)
    return TarIndex(table[:, :3], Names(table[:, 3], block), pairs, folder)
