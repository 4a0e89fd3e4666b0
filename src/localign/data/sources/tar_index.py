"""Where each image of tar shards lies, found once and then kept in a folder of three files.

``records.npy`` and ``names.npy`` are memory-mapped, so all ranks and loader workers of a machine share them;
``index.json`` says of which shards they are. Nothing in them is unpickled; what does not fit is made again.
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
"""Columns of the records."""

Problems = tuple[tuple[str, str], ...]
Contents = tuple[NDArray[np.int64], Names, Problems]
"""Records, names and problems, see :class:`TarIndex`."""
State = tuple[int, int]
"""Size in bytes and time of change of a shard."""

PORTABLE = "index.npz"
_VERSION = 1
_THREADS = 8
_TOLD_FROM = 16
_HEADER = 512


@dataclass
class Scan:
    """The images of one shard."""

    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    """(offset, size) of each, bytes."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of what looks like an image and is none, or of the shard itself."""


class TarIndex:
    """All images of some shards, in the order of the shards.

    Args:
        records: int64 ``(images, 3)``: offset, size in bytes, and the shard's number.
        names: Of the images.
        problems: (name, reason) of what cannot be read.
        folder: Where the index was read from; None: it is in memory alone.
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
        """To spawned workers goes where the files are, not what is in them."""
        if self.folder is None:
            return TarIndex, (self.records, self.names, self.problems)
        return _load, (self.folder, int(self.records[:, SHARD].max()) + 1)


def scan_shard(file: IO[bytes], shard: str) -> Scan:
    """Go through the headers of a tar file.

    Args:
        file: Seekable.
        shard: How it is called in problems and errors.

    Raises:
        UserError: It is no uncompressed tar file, or a member's name leads out of it.
    """
    scan, end = Scan(), 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep every one
                if tar.offset <= end:
                    raise tarfile.ReadError("a header that leads backwards")
                end = tar.offset
                _note(scan, member, shard)
            end = tar.offset
        file.seek(end)
        if file.read(_HEADER).strip(b"\0"):
            raise tarfile.ReadError("no header")
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if not scan.names:
            raise UserError(
                f"{shard} is not a tar file that can be read ({error}); shards are uncompressed"
            ) from None
        scan.problems.append((shard, f"damaged or cut short after {len(scan.names)} images: {error}"))
    return scan


def _note(scan: Scan, member: tarfile.TarInfo, shard: str) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{shard} has a member whose name leads out of it, {member.name!r}; it is not read")
    if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
        return
    if member.isreg() and not member.issparse():
        scan.names.append(str(path))
        scan.places.append((member.offset_data, member.size))
    elif not member.isdir():
        scan.problems.append((str(path), f"in {shard} it is a link, not a file"))


def tar_index(shards: Sequence[Path]) -> TarIndex:
    """The index of local shards, made if it is not there yet or does not fit them.

    It is kept beside the first shard, or where nothing can be written there, in the user's cache folder.

    Raises:
        UserError: A shard is missing or no tar file, leads out of itself, or all of them hold no image.
    """
    states = [_state(path) for path in shards]
    names = [path.name for path in shards]
    return kept_index(names, states, list(_folders(shards)), lambda: joined(_scan_all(shards)))


def kept_index(
    shards: Sequence[str], states: Sequence[State], folders: Sequence[Path], make: Callable[[], Contents]
) -> TarIndex:
    """An index that is kept in one of some folders, or is made and then kept in the first that can be written.

    Args:
        shards: Names.
        states: Of the shards: an index that was made of other ones is not taken.
        folders: Where it may lie.
        make: Makes it.
    """
    digest = identity(shards, states)
    for folder in folders:
        if (index := _load_if_fits(folder, digest, len(shards))) is not None:
            return index
    records, names, problems = make()
    for folder in folders:
        if write_index(folder, digest, records, names, problems):
            index = _load_if_fits(folder, digest, len(shards))
            if index is not None:
                return index
    return TarIndex(records, names, problems)


def identity(names: Sequence[str], states: Sequence[State]) -> str:
    """A hash of shards' names and states: an index is of these shards and no others."""
    content = json.dumps([[name, *state] for name, state in zip(names, states, strict=True)])
    return hashlib.blake2b(f"{_VERSION}|{content}".encode(), digest_size=16).hexdigest()


def _state(path: Path) -> State:
    """Size and time of change: a shard that has others is indexed again."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def _folders(shards: Sequence[Path]) -> Iterator[Path]:
    """Where an index of these shards may lie."""
    here = shards[0].absolute().parent
    key = hashlib.blake2b("|".join(p.name for p in shards).encode(), digest_size=6).hexdigest()
    yield here / f".localign-index-{key}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    full = hashlib.blake2b("|".join(str(p.absolute()) for p in shards).encode(), digest_size=12).hexdigest()
    yield cache / "localign" / "tar-index" / full


def _scan_all(shards: Sequence[Path]) -> Iterator[Scan]:
    if len(shards) >= _TOLD_FROM:
        print(f"indexing {len(shards)} shards, once", file=sys.stderr)

    def scan(path: Path) -> Scan:
        try:
            with open(path, "rb") as file:
                return scan_shard(file, path.name)
        except OSError as error:
            raise UserError(f"cannot read the shard {path}: {error.strerror}") from None

    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(scan, shards)


def joined(scans: Iterable[Scan]) -> Contents:
    """Records, names and problems of shards in their order.

    Raises:
        UserError: They hold no image.
    """
    records, names, problems = [], [], []
    for number, scan in enumerate(scans):  # packed one by one: lists of millions would fill the memory
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
    """Keep an index; False where nothing can be written, or another process does just now."""
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
    """Write an index into one file, ``index.npz``, for shards that will be read from elsewhere."""
    states = [(path.stat().st_size, 0) for path in shards]  # times are lost on the way
    about = {"digest": identity([p.name for p in shards], states), "problems": list(index.problems)}
    with replacing(folder / PORTABLE) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            records=np.column_stack([index.records, index.names.ends]),
            names=index.names.block,
        )


def _load_if_fits(folder: Path, digest: str, shards: int) -> TarIndex | None:
    try:
        if json.loads((folder / "index.json").read_text(encoding="utf-8"))["digest"] != digest:
            return None
        return _load(folder, shards)
    except (OSError, ValueError, KeyError, TypeError, EOFError, IndexError, RecursionError):
        return None  # not there, or damaged: it is made again


def _load(folder: Path, shards: int) -> TarIndex:
    about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    table = np.load(folder / "records.npy", mmap_mode="r", allow_pickle=False)
    block = np.load(folder / "names.npy", mmap_mode="r", allow_pickle=False)
    return index_from_arrays(table, block, about["problems"], shards, folder)


def index_from_arrays(
    table: NDArray[Any], block: NDArray[Any], problems: Any, shards: int, folder: Path | None = None
) -> TarIndex:
    """Arrays as they were written, of so many shards. Raises ValueError where they are no index."""
    if table.ndim != 2 or table.shape[1] != 4 or table.dtype != np.int64 or block.dtype != np.uint8:
        raise ValueError("not an index of shards")
    offsets, sizes, numbers, ends = table.T
    fits = (
        len(table) > 0
        and 0 <= numbers.min() <= numbers.max() < shards
        and offsets.min() >= 0 <= sizes.min()
        and ends[0] >= 0 <= np.diff(ends).min(initial=0)
        and ends[-1] == len(block)
    )
    if not fits:
        raise ValueError("a damaged index of shards")
    known = tuple((str(name), str(reason)) for name, reason in problems)
    return TarIndex(table[:, :3], Names(table[:, 3], block), known, folder)
