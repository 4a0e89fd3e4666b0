"""Shards that lie elsewhere: fetched whole, one by one, into a bounded folder that a machine's processes share.

What an address means is fsspec's business. The order of the samples is a pure function of the seed and the position,
as for files that are here: shards are shuffled, and images within some shards at a time, so that few need be kept.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
import numpy as np

from localign.data.sources.base import EncodedSource
from localign.data.sources.tar import OpenFiles, TarSource
from localign.data.sources.tar_index import (
    PORTABLE,
    SHARD,
    TarIndex,
    identity,
    index_from_arrays,
    joined,
    kept_index,
    scan_shard,
)
from localign.errors import RunFailure, UserError

T = TypeVar("T")

WINDOW = 8
"""Shards within which images are shuffled."""
AT_ONCE = 32
"""Addresses that are asked something at the same time."""
WAITS = (1.0, 5.0, 25.0)
"""Seconds before another try where something cannot be fetched; the last failure ends the run."""


class RemoteFiles:
    """Files by their addresses; goes to other processes as names alone.

    Args:
        urls: Addresses.
        sizes: Of the files, bytes.
        folder: Where they are kept.
        most: How many are kept; those longest not asked for go first.
    """

    def __init__(self, urls: Sequence[str], sizes: Sequence[int], folder: Path, most: int) -> None:
        self.urls, self.sizes, self.folder, self.most = tuple(urls), tuple(sizes), folder, most

    def local(self, number: int) -> Path:
        """Where a file lies here, fetched if need be.

        Raises:
            RunFailure: It cannot be fetched, or is not what it was when the run began.
        """
        path = self.folder / f"{number:06}{PurePosixPath(self.urls[number]).suffix}"
        with suppress(FileNotFoundError):
            os.utime(path)
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f"{number:06}.lock"):  # of all processes one fetches
            if not path.exists():
                self._make_room()
                patiently(lambda: self._fetch(number, path), self.urls[number])
        return path

    def _fetch(self, number: int, path: Path) -> None:
        url, temporary = self.urls[number], path.with_suffix(f".{os.getpid()}.tmp")
        try:
            filesystem, inner = fsspec.core.url_to_fs(url)
            filesystem.get_file(inner, str(temporary))
            size = temporary.stat().st_size
            if size != self.sizes[number]:
                raise OSError(f"{size} bytes came of {self.sizes[number]}")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self) -> None:
        with _locked(self.folder / "room.lock"):
            kept = []
            for file in self.folder.iterdir():
                if file.suffix not in (".lock", ".tmp"):
                    with suppress(FileNotFoundError):
                        kept.append((file.stat().st_mtime_ns, file))
            for _, file in sorted(kept)[: max(0, len(kept) + 1 - self.most)]:
                file.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not there on every system that can read local files

    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def patiently(action: Callable[[], T], what: str) -> T:
    """Do what may fail on the way, again if need be.

    Raises:
        RunFailure: It fails every time: to pass over what a broken line hides would quietly change the data.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except Exception as error:  # each of fsspec's file systems has errors of its own
            if wait is None:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise RunFailure(f"cannot read {what}: {reason}") from None
            time.sleep(wait)
    raise AssertionError("unreachable")


class StreamedTarSource(TarSource):
    """Tar shards by addresses that fsspec knows: s3://, gs://, https:// and others.

    Their index is ``index.npz`` beside them, as ``localign data shard`` writes it, or is made by reading them once.

    Args:
        urls: The shards.
        image_size: As for ``FolderSource``.

    Attributes:
        blocks: int64, the images of each shard.
        window: How many shards are shuffled at a time.

    Raises:
        UserError: A shard cannot be found, or is no tar file, or there is no image.
    """

    kind = "remote tar"

    def __init__(self, urls: Sequence[str], image_size: tuple[int, int] | None = None) -> None:
        EncodedSource.__init__(self, image_size)
        self.urls = tuple(urls)
        self.shards = tuple(Path(name_of(url)) for url in urls)
        sizes = sizes_of(urls)
        self.index = _remote_index(self.urls, sizes)
        self.unreadable = self.index.problems
        self.blocks = np.bincount(self.index.records[:, SHARD], minlength=len(urls))
        self.window = WINDOW
        self._remote = RemoteFiles(self.urls, sizes, cache_folder("shards", urls, sizes), 2 * WINDOW + 2)
        self._files = OpenFiles(WINDOW)

    @property
    def notice(self) -> str:
        """What is promised of the order, and what is kept here."""
        kept = min(self._remote.most, len(self.urls)) * max(self._remote.sizes) / 2**30
        return (
            f"{len(self.urls)} shards are fetched from {parent_of(self.urls[0])}, in a new order in each epoch, their "
            f"images shuffled within {self.window} of them at a time; a run continues exactly at its sample, on any "
            f"number of processes; at most {kept:.1f} GiB are kept in {self._remote.folder}"
        )

    def _descriptor(self, shard: int) -> int:
        path = self._remote.local(shard)
        try:
            return self._files(path)
        except FileNotFoundError:  # another process made room just now
            return self._files(self._remote.local(shard))


def name_of(url: str) -> str:
    """The last part of an address."""
    return PurePosixPath(url.partition("?")[0]).name


def parent_of(url: str) -> str:
    """An address without its last part."""
    return url.partition("?")[0].rpartition("/")[0]


def cache_folder(what: str, urls: Sequence[str], sizes: Sequence[int]) -> Path:
    """Where something of the files at these addresses is kept, for this user. Those whose size has changed have
    another place."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "localign" / what / identity(urls, [(size, 0) for size in sizes])


@contextmanager
def _on_the_way(what: str) -> Iterator[None]:
    """Errors of a file system as one line, before a run starts."""
    try:
        yield
    except (UserError, RunFailure):
        raise
    except FileNotFoundError:
        raise UserError(f"there is no {what}") from None
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise UserError(
            f"cannot reach {what}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None


def opened(url: str) -> Any:
    """A file to read from anywhere within it. Raises UserError where it is not there."""
    with _on_the_way(url):
        filesystem, inner = fsspec.core.url_to_fs(url)
        return filesystem.open(inner, "rb")


def at_once(action: Callable[[str], T], urls: Sequence[str]) -> list[T]:
    """What an action gives for each address, in their order, many at a time: each does little but wait.

    The first failure, in the order of the addresses, is raised; what has not begun by then does not begin.
    """
    with ThreadPoolExecutor(max(1, min(AT_ONCE, len(urls)))) as threads:
        answers = [threads.submit(action, url) for url in urls]
        try:
            return [answer.result() for answer in answers]
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def sizes_of(urls: Sequence[str]) -> list[int]:
    """Bytes of each file. Raises UserError where one is not there."""
    return at_once(_size_of, urls)


def _size_of(url: str) -> int:
    with _on_the_way(url):
        # Here, for most file systems want an instance for each thread.
        filesystem, inner = fsspec.core.url_to_fs(url)
        size = filesystem.info(inner)["size"]
        if size is None:
            raise UserError(f"{url} does not say how large it is; fetch the shards first")
        return int(size)


def find_remote(patterns: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """The addresses of files that patterns with ``*`` or folders stand for.

    Raises:
        UserError: None fits, or the file system cannot be reached.
    """
    found: list[str] = []
    for pattern in patterns:
        if PurePosixPath(pattern.partition("?")[0]).suffix in suffixes and "*" not in pattern:
            found.append(pattern)
            continue
        with _on_the_way(pattern):
            filesystem, inner = fsspec.core.url_to_fs(pattern)
            globs = [inner] if "*" in pattern else [f"{inner.rstrip('/')}/*{suffix}" for suffix in suffixes]
            matches = next((m for g in globs if (m := sorted(filesystem.glob(g)))), [])
            found += [filesystem.unstrip_protocol(match) for match in matches]
    if not found:
        raise UserError(f"no {' or '.join(suffixes)} file is called like {', '.join(patterns)}")
    return found


def _remote_index(urls: Sequence[str], sizes: Sequence[int]) -> TarIndex:
    states = [(size, 0) for size in sizes]
    names = [name_of(url) for url in urls]
    folder = cache_folder("tar-index", urls, sizes)

    def make() -> Any:
        content = _portable(urls[0], identity(names, states), sum(sizes), len(urls))
        if content is not None:
            return content
        print(
            f"indexing {len(urls)} shards, {sum(sizes) / 2**30:.1f} GiB that are read for it, once: no {PORTABLE} "
            "that goes with them lies beside them, as `localign data shard` writes it",
            file=sys.stderr,
        )
        return joined(_scanned(url) for url in urls)

    return kept_index(names, states, [folder], make)


def _scanned(url: str) -> Any:
    with opened(url) as file, _on_the_way(url):
        return scan_shard(file, name_of(url))


def _portable(first: str, digest: str, total: int, shards: int) -> Any:
    """The index beside the shards, or None where there is none of these shards."""
    query = first.partition("?")[1:]
    url = f"{parent_of(first)}/{PORTABLE}{''.join(query)}"
    try:
        filesystem, inner = fsspec.core.url_to_fs(url)
        data = filesystem.cat_file(inner)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > total + 2**20:
                return None  # more than there can be to say of shards of this size
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about["digest"] != digest:
                return None
            index = index_from_arrays(arrays["records"], arrays["names"], about["problems"], shards)
    except Exception:  # not there, of another kind, or not to be reached: it is made from the shards
        return None
    return index.records, index.names, index.problems
