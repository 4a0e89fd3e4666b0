"""The index of tar shards: the offset and size of each image, found once and cached in a folder of three files.

``records.npy`` and ``names.npy`` are memory-mapped, so all ranks and loader workers of a machine share them.
``index.json`` identifies the shards. Nothing is unpickled; an index that does not match its shards is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from localign.data.sources.base import Names
from localign.data.sources.layouts.identity import HEAD, known_content, short_names
from localign.data.sources.layouts.packed import are_packed
from localign.data.sources.layouts.webdataset import (
    EVERY_FILE,
    LABEL_FIELDS,
    MAX_LABEL_BYTES,
    Scan,
    no_images,
    notice_of,
    sort_of,
    split_name,
)
from localign.errors import UserError
from localign.files import replacing, replacing_folder
from localign.text.printing import printable

OFFSET, SIZE, SHARD = 0, 1, 2
"""Columns of ``TarIndex.records``."""

Problems = tuple[tuple[str, str], ...]
State = tuple[int, int]
"""Size in bytes and modification time in nanoseconds of a shard."""

PORTABLE = "index.npz"
_VERSION = 1
_THREADS = 8
_ANNOUNCE_FROM = 16
_HEADER = 512


class TarIndex:
    """All images of a sequence of shards, in order.

    Args:
        records: int64 ``(images, 3)``: offset in bytes, size in bytes, and the shard's number.
        names: Names of the images.
        problems: (name, reason) of members and shards that cannot be read.
        folder: The folder of the index; None if it is in memory only.
        labels: The label of each image, "" without one; None if no image has a label.
        notice: A line about image files that are left out, or None.
        ambiguous: Whether images of different shards share a name. None: unknown, in an index of an older version.
    """

    def __init__(
        self,
        records: NDArray[np.int64],
        names: Names,
        problems: Problems,
        folder: Path | None = None,
        labels: Names | None = None,
        notice: str | None = None,
        ambiguous: bool | None = None,
    ) -> None:
        self.records, self.names, self.problems, self.folder = records, names, problems, folder
        self.labels, self.notice, self.ambiguous = labels, notice, ambiguous

    def __len__(self) -> int:
        return len(self.records)

    def __reduce__(self) -> tuple[Callable[..., TarIndex], tuple[Any, ...]]:
        """Pickle the folder instead of the arrays, if there is a folder."""
        if self.folder is None:
            arrays = self.records, self.names, self.problems, None, self.labels, self.notice, self.ambiguous
            return TarIndex, arrays
        return _load, (self.folder, int(self.records[:, SHARD].max()) + 1, self.ambiguous)


def scan_shard(file: IO[bytes], shard: str, fields: tuple[str, ...] = ()) -> Scan:
    """Read the headers of a tar file.

    Args:
        file: A seekable file.
        shard: The name of the shard in problems and errors.
        fields: See :class:`Scan`.

    Raises:
        UserError: The file is not an uncompressed tar file, or a member's name leads out of it.
    """
    scan, end, shown = Scan(shard, fields), 0, printable(shard)
    what = known_content(file.read(HEAD), "tar")
    if what is not None:
        raise UserError(f"{shown} is not a readable tar file: it is {what}")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all members in memory
                if tar.offset <= end:
                    raise tarfile.ReadError("a header that leads backwards")
                end = tar.offset
                _add_member(scan, member, file)
            end = tar.offset
        file.seek(end)
        if file.read(_HEADER).strip(b"\0"):
            raise tarfile.ReadError("no header")
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if not scan.found:
            raise UserError(
                f"{shown} is not a readable tar file ({printable(error)}); shards must be uncompressed"
            ) from None
        scan.problems.append(
            (shard, f"damaged or truncated after {len(scan.names)} images: {printable(error)}")
        )
    scan.choose()
    return scan


def _add_member(scan: Scan, member: tarfile.TarInfo, file: IO[bytes]) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{printable(scan.shard)} is refused: the name of its member {printable(repr(member.name))} leads out of "
            "the shard"
        )
    name = str(path)
    if path.name.startswith(".") or member.isdir():
        return
    wanted = scan.wants(name)
    if not member.isreg() or member.issparse():
        if wanted:
            scan.problems.append((name, f"{sort_of(member)} in {scan.shard}, not a file"))
        return
    if wanted:
        scan.names.append(name)
        scan.places.append((member.offset_data, member.size))
    elif split_name(name)[1] in LABEL_FIELDS and member.size <= MAX_LABEL_BYTES:
        file.seek(member.offset_data)
        scan.add_label(name, file.read(member.size))


def tar_index(shards: Sequence[Path], fields: tuple[str, ...] = ()) -> TarIndex:
    """The index of local shards, built if it is missing or does not match the shards.

    It is cached in the folder of the first shard, or in the user's cache folder if that folder is read-only. Every file
    of shards that ``localign data shard`` wrote is an image of its own; other shards hold samples, see
    :mod:`localign.data.sources.layouts.webdataset`.

    Raises:
        UserError: A shard is missing or not a tar file, a member's name leads out of its shard, or the shards hold
            no images.
    """
    states = [_state(path) for path in shards]
    packed = not fields and are_packed(shards, [size for size, _ in states])
    wanted = (EVERY_FILE,) if packed else fields
    digest = shards_digest([path.name for path in shards], states, None if packed else fields)
    folders = [for_fields(folder, fields) for folder in _index_folders(shards)]
    index = cached_index(digest, len(shards), folders, lambda: join_scans(_scan_all(shards, wanted), fields))
    if index.ambiguous is None:  # an older version wrote the index
        several = len({path.parent for path in shards}) > 1 or not packed
        index.ambiguous = several and _repeats([np.fromiter(map(hash, index.names), np.int64, len(index))])
    return index


def cached_index(digest: str, shards: int, folders: Sequence[Path], make: Callable[[], TarIndex]) -> TarIndex:
    """Load an index from one of several folders, or build it and save it in the first writable folder.

    Args:
        digest: Identifies the index, see :func:`shards_digest`; an index with another digest is rebuilt.
        shards: Number of shards.
        folders: Folders in which the index may lie.
        make: Builds the index.
    """
    for folder in folders:
        if (index := _load_if_current(folder, digest, shards)) is not None:
            return index
    made = make()
    for folder in folders:
        if write_index(folder, digest, made):
            index = _load_if_current(folder, digest, shards)
            if index is not None:
                return index
    return made


def shards_digest(
    names: Sequence[str], states: Sequence[State], fields: tuple[str, ...] | None = None
) -> str:
    """A hash of the names and states of shards, which identifies the index of these shards.

    Args:
        names: Names of the shards.
        states: Their states.
        fields: The image fields, () for the default choice; None if every file is an image.
    """
    content = json.dumps([[name, *state] for name, state in zip(names, states, strict=True)])
    chosen = "" if fields is None else f"samples {','.join(fields)}|"
    return hashlib.blake2b(f"{_VERSION}|{chosen}{content}".encode(), digest_size=16).hexdigest()


def _state(path: Path) -> State:
    """The state of a shard; a shard is indexed again when its state changes."""
    try:
        about = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the shard {printable(path)}: {printable(reason)}") from None
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"the shard {printable(path)} is a folder or a special file, not a regular file")
    return about.st_size, about.st_mtime_ns


def _index_folders(shards: Sequence[Path]) -> Iterator[Path]:
    """The folders in which the index of these shards may lie."""
    key = hashlib.blake2b(os.fsencode("|".join(p.name for p in shards)), digest_size=6).hexdigest()
    yield shards[0].absolute().parent / f".localign-index-{key}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    full = hashlib.blake2b(
        os.fsencode("|".join(str(p.absolute()) for p in shards)), digest_size=12
    ).hexdigest()
    yield cache / "localign" / "tar-index" / full


def for_fields(folder: Path, fields: tuple[str, ...]) -> Path:
    """The folder of the index of chosen fields, beside the folder of the usual index."""
    if not fields:
        return folder
    chosen = hashlib.blake2b(",".join(fields).encode(), digest_size=4).hexdigest()
    return folder.with_name(f"{folder.name}-{chosen}")


def _scan_all(shards: Sequence[Path], fields: tuple[str, ...]) -> Iterator[Scan]:
    if len(shards) >= _ANNOUNCE_FROM:
        print(f"indexing {len(shards)} shards (needed once)", file=sys.stderr)

    def scan(path: Path, name: str) -> Scan:
        try:
            with open(path, "rb") as file:
                return scan_shard(file, name, fields)
        except OSError as error:
            raise UserError(f"cannot read the shard {printable(path)}: {error.strerror}") from None

    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(scan, shards, short_names([path.as_posix() for path in shards]))


def join_scans(scans: Iterable[Scan], fields: tuple[str, ...] = ()) -> TarIndex:
    """The images and problems of several scans, concatenated.

    Args:
        scans: The scans.
        fields: The image fields that were asked for, for errors.

    Raises:
        UserError: The shards hold no images.
    """
    records, names, labels, hashes = [], [], [], []
    problems: list[tuple[str, str, str]] = []
    found: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    companions: set[str] = set()
    dotted: dict[int, str] = {}
    begin = 0
    for number, scan in enumerate(scans):  # into arrays at once: lists of millions of names fill the memory
        places = np.array(scan.places, dtype=np.int64).reshape(-1, 2)
        records.append(np.column_stack([places, np.full(len(places), number)]))
        names.append(Names.of(scan.names))
        labels.append(Names.of(scan.labels or [""] * len(scan.names)))
        hashes.append(np.fromiter(map(hash, scan.names), np.int64, len(scan.names)))
        problems += [(scan.shard, *problem) for problem in scan.problems]
        found.update(scan.found)
        left_out.update(scan.left_out)
        companions |= scan.companions
        dotted |= {begin + place: part for place, part in scan.dotted.items()}
        begin += len(scan.names)
    table, all_names, all_labels = np.concatenate(records), Names.joined(names), Names.joined(labels)
    out = [number for number, part in dotted.items() if part in companions]
    if out:  # what stands beside the images of some samples is no image of others
        left_out.update(dotted[number] for number in out)
        kept = np.setdiff1d(np.arange(len(table)), out).tolist()
        table = table[kept]
        all_names, all_labels = (Names.of(part[n] for n in kept) for part in (all_names, all_labels))
    if not len(table):
        raise UserError(no_images(len(records), fields, found.most_common(8)))
    ambiguous = len(records) > 1 and _repeats(hashes)
    pairs = tuple(
        (f"{shard}:{name}" if ambiguous and name != shard else name, reason)
        for shard, name, reason in problems
    )
    some = all_labels if len(all_labels.block) else None
    return TarIndex(table, all_names, pairs, None, some, notice_of(left_out), ambiguous)


def _repeats(hashes: Sequence[NDArray[np.int64]]) -> bool:
    joined = np.concatenate(hashes)
    return len(np.unique(joined)) < len(joined)


def write_index(folder: Path, digest: str, index: TarIndex) -> bool:
    """Save an index. Returns False if the folder cannot be written, or if another process is writing it."""
    about = {
        "version": _VERSION,
        "digest": digest,
        "problems": list(index.problems),
        "notice": index.notice,
        "ambiguous": index.ambiguous,
    }
    try:
        with replacing_folder(folder) as temporary:
            np.save(temporary / "records.npy", np.column_stack([index.records, index.names.ends]))
            np.save(temporary / "names.npy", index.names.block)
            if index.labels is not None:
                np.save(temporary / "label-ends.npy", index.labels.ends)
                np.save(temporary / "labels.npy", index.labels.block)
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, IndexError, RecursionError):
        return None  # missing or damaged: the index is rebuilt


def _load(folder: Path, shards: int, ambiguous: bool | None = None) -> TarIndex:
    about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    table = np.load(folder / "records.npy", mmap_mode="r", allow_pickle=False)
    block = np.load(folder / "names.npy", mmap_mode="r", allow_pickle=False)
    index = index_from_arrays(table, block, about["problems"], shards, folder)
    if (folder / "labels.npy").exists():
        ends = np.load(folder / "label-ends.npy", allow_pickle=False)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        if ends.dtype != np.int64 or ends.shape != (len(table),) or not _are_names(ends, labels):
            raise ValueError("a damaged index of shards")
        index.labels = Names(ends, labels)
    notice, index.ambiguous = about.get("notice"), about.get("ambiguous") if ambiguous is None else ambiguous
    index.notice = notice if isinstance(notice, str) else None
    return index


def _are_names(ends: NDArray[Any], block: NDArray[Any]) -> bool:
    return bool(
        block.dtype == np.uint8 and ends[0] >= 0 <= np.diff(ends).min(initial=0) and ends[-1] == len(block)
    )


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
        and _are_names(ends, block)
    )
    if not valid:
        raise ValueError("a damaged index of shards")
    pairs = tuple((str(name), str(reason)) for name, reason in problems)
    return TarIndex(table[:, :3], Names(table[:, 3], block), pairs, folder)
