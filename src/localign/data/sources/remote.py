"""Remote tar shards, each fetched as a whole into a cache folder of bounded size that a machine's processes share.

fsspec interprets the URLs. As for local files, the order of samples is a pure function of the seed and the position:
the shards are shuffled, and the images within a few shards at a time, so that the cache holds few shards.
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

from localign.data.sources.base import EncodedSource, name_of
from localign.data.sources.layouts.identity import short_names
from localign.data.sources.layouts.webdataset import Scan
from localign.data.sources.tar import OpenFiles, TarSource
from localign.data.sources.tar_index import (
    PORTABLE,
    SHARD,
    TarIndex,
    cached_index,
    for_fields,
    index_from_arrays,
    join_scans,
    scan_shard,
    shards_digest,
)
from localign.errors import RunFailure, UserError
from localign.text.printing import first_line

T = TypeVar("T")

WINDOW = 8
"""Number of shards within which images are shuffled."""
MAX_CONCURRENT = 32
"""Requests that are sent at the same time."""
RETRY_DELAYS = (1.0, 5.0, 25.0)
"""Seconds before each retry of a failed request; the last failure ends the run."""


class RemoteFiles:
    """A cache of remote files, which drops the least recently used files first.

    Args:
        urls: URLs of the files.
        sizes: Sizes of the files, bytes.
        folder: The cache folder.
        max_files: Number of files in the cache, at most.
    """

    def __init__(self, urls: Sequence[str], sizes: Sequence[int], folder: Path, max_files: int) -> None:
        self.urls, self.sizes, self.folder, self.max_files = tuple(urls), tuple(sizes), folder, max_files

    def local(self, number: int) -> Path:
        """The path of a file in the cache; the file is fetched if it is not there.

        Raises:
            RunFailure: The file cannot be fetched, or its size has changed since the run began.
        """
        path = self.folder / f"{number:06}{PurePosixPath(self.urls[number]).suffix}"
        with suppress(FileNotFoundError):
            os.utime(path)
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f"{number:06}.lock"):  # only one process fetches
            if not path.exists():
                self._evict()
                with_retries(lambda: self._fetch(number, path), self.urls[number])
        return path

    def _fetch(self, number: int, path: Path) -> None:
        url, temporary = self.urls[number], path.with_suffix(f".{os.getpid()}.tmp")
        try:
            filesystem, inner = fsspec.core.url_to_fs(url)
            filesystem.get_file(inner, str(temporary))
            size = temporary.stat().st_size
            if size != self.sizes[number]:
                raise OSError(f"received {size} bytes instead of {self.sizes[number]}")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _evict(self) -> None:
        with _locked(self.folder / "room.lock"):
            cached = []
            for file in self.folder.iterdir():
                if file.suffix not in (".lock", ".tmp"):
                    with suppress(FileNotFoundError):
                        cached.append((file.stat().st_mtime_ns, file))
            for _, file in sorted(cached)[: max(0, len(cached) + 1 - self.max_files)]:
                file.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except (
        ImportError
    ):  # Windows: two processes may fetch the same shard, which each puts in place as a whole
        yield
        return
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def with_retries(action: Callable[[], T], target: str) -> T:
    """Run an action, and retry it after each of ``RETRY_DELAYS`` if it fails.

    Raises:
        RunFailure: The action fails every time. Skipping the data instead would silently change the stream.
    """
    for delay in (*RETRY_DELAYS, None):
        try:
            return action()
        except Exception as error:  # each fsspec file system raises its own errors
            if delay is None:
                raise RunFailure(f"cannot read {target}: {first_line(error)}") from None
            time.sleep(delay)
    raise AssertionError("unreachable")


class StreamedTarSource(TarSource):
    """Tar shards at URLs that fsspec knows: s3://, gs://, https:// and others.

    The index is ``index.npz`` in the shards' folder, as ``localign data shard`` writes it. Without that file, all
    shards are read once to build the index.

    Args:
        urls: URLs of the shards.
        image_size: As for ``FolderSource``.
        fields: As for ``TarSource``.

    Attributes:
        blocks: int64, the number of images in each shard.
        window: Number of shards within which images are shuffled.

    Raises:
        UserError: A shard cannot be found or is not a tar file, or the shards hold no images.
    """

    kind = "remote tar"

    def __init__(
        self, urls: Sequence[str], image_size: tuple[int, int] | None = None, fields: tuple[str, ...] = ()
    ) -> None:
        EncodedSource.__init__(self, image_size)
        self.urls = tuple(urls)
        self.shards = tuple(Path(name_of(url)) for url in urls)
        sizes = sizes_of(urls)
        self.index = _remote_index(self.urls, sizes, fields)
        self.shard_names = short_names(self.urls)
        self.unreadable = self.index.problems
        self.blocks = np.bincount(self.index.records[:, SHARD], minlength=len(urls))
        self.window = WINDOW
        self._remote = RemoteFiles(self.urls, sizes, cache_folder("shards", urls, sizes), 2 * WINDOW + 2)
        self._files = OpenFiles(WINDOW)

    def data_files(self) -> Iterator[tuple[str, str]]:
        return iter(())

    @property
    def notice(self) -> str:
        """The order of shuffling, and the size of the cache."""
        cached = min(self._remote.max_files, len(self.urls)) * max(self._remote.sizes) / 2**30
        left_out = f"{self.index.notice}; " if self.index.notice else ""
        return left_out + (
            f"{len(self.urls)} shards are fetched from {parent_of(self.urls[0])} in a new order in each epoch; images "
            f"are shuffled within {self.window} shards at a time; a run resumes exactly at its sample, on any number "
            f"of processes; at most {cached:.1f} GiB are cached in {self._remote.folder}"
        )

    def _descriptor(self, shard: int) -> int:
        path = self._remote.local(shard)
        try:
            return self._files(path)
        except FileNotFoundError:  # another process has just evicted the shard
            return self._files(self._remote.local(shard))


def parent_of(url: str) -> str:
    """A URL without the last part of its path and without its query."""
    return url.partition("?")[0].rpartition("/")[0]


def cache_folder(kind: str, urls: Sequence[str], sizes: Sequence[int]) -> Path:
    """The user's cache folder of one kind for these files. Files whose sizes have changed get another folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "localign" / kind / shards_digest(urls, [(size, 0) for size in sizes])


@contextmanager
def _as_user_error(target: str) -> Iterator[None]:
    """Turn errors of a file system into UserError, for use before a run starts."""
    try:
        yield
    except (UserError, RunFailure):
        raise
    except FileNotFoundError:
        raise UserError(f"there is no {target}") from None
    except Exception as error:  # each fsspec file system raises its own errors
        raise UserError(f"cannot reach {target}: {first_line(error)}") from None


def open_remote(url: str) -> Any:
    """Open a remote file for random access. Raises UserError if it does not exist or cannot be reached."""
    with _as_user_error(url):
        filesystem, inner = fsspec.core.url_to_fs(url)
        return filesystem.open(inner, "rb")


def map_concurrently(action: Callable[[str], T], urls: Sequence[str]) -> list[T]:
    """Apply an action that mostly waits to each URL, many at a time, and return the results in order.

    The first failure, in the order of the URLs, is raised and cancels the actions that have not started.
    """
    with ThreadPoolExecutor(max(1, min(MAX_CONCURRENT, len(urls)))) as threads:
        futures = [threads.submit(action, url) for url in urls]
        try:
            return [future.result() for future in futures]
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def sizes_of(urls: Sequence[str]) -> list[int]:
    """The size of each file, bytes. Raises UserError if a file does not exist or cannot be reached."""
    return map_concurrently(_size_of, urls)


def _size_of(url: str) -> int:
    with _as_user_error(url):
        # Most file systems need one instance per thread.
        filesystem, inner = fsspec.core.url_to_fs(url)
        size = filesystem.info(inner)["size"]
        if size is None:
            raise UserError(f"the size of {url} is unknown; download the files first")
        return int(size)


def find_remote(patterns: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """The URLs of the files that match patterns with ``*``, or that lie in folders.

    Raises:
        UserError: No file matches, or the file system cannot be reached.
    """
    found: list[str] = []
    for pattern in patterns:
        if PurePosixPath(pattern.partition("?")[0]).suffix in suffixes and "*" not in pattern:
            found.append(pattern)
            continue
        with _as_user_error(pattern):
            filesystem, inner = fsspec.core.url_to_fs(pattern)
            globs = [inner] if "*" in pattern else [f"{inner.rstrip('/')}/*{suffix}" for suffix in suffixes]
            matches = next((m for g in globs if (m := sorted(filesystem.glob(g)))), [])
            found += [filesystem.unstrip_protocol(match) for match in matches]
    if not found:
        raise UserError(f"no {' or '.join(suffixes)} file matches {', '.join(patterns)}")
    return found


def _remote_index(urls: Sequence[str], sizes: Sequence[int], fields: tuple[str, ...]) -> TarIndex:
    states = [(size, 0) for size in sizes]
    names = [name_of(url) for url in urls]
    folder = for_fields(cache_folder("tar-index", urls, sizes), fields)

    def make() -> TarIndex:
        if not fields:
            index = _fetch_index(urls[0], shards_digest(names, states), sum(sizes), len(urls))
            if index is not None:
                return index
        print(
            f"indexing {len(urls)} shards, which reads {sum(sizes) / 2**30:.1f} GiB once: their folder has no "
            f"matching {PORTABLE}, which `localign data shard` writes",
            file=sys.stderr,
        )
        scans = (_scan_remote(url, name, fields) for url, name in zip(urls, short_names(urls), strict=True))
        return join_scans(scans, fields)

    return cached_index(shards_digest(names, states, fields), len(urls), [folder], make)


def _scan_remote(url: str, name: str, fields: tuple[str, ...]) -> Scan:
    with open_remote(url) as file, _as_user_error(url):
        return scan_shard(file, name, fields)


def _fetch_index(first: str, digest: str, total: int, shards: int) -> TarIndex | None:
    """The index ``index.npz`` in the shards' folder, or None if it is missing or does not match the shards."""
    query = first.partition("?")[1:]
    url = f"{parent_of(first)}/{PORTABLE}{''.join(query)}"
    try:
        filesystem, inner = fsspec.core.url_to_fs(url)
        data = filesystem.cat_file(inner)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > total + 2**20:
                return None  # an index is never larger than its shards
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about["digest"] != digest:
                return None
            index = index_from_arrays(arrays["records"], arrays["names"], about["problems"], shards)
    except Exception:  # missing, damaged or out of reach: the index is built from the shards instead
        return None
    index.ambiguous = False  # `localign data shard` gives every image a name of its own
    return index
