"""Remote shards are fetched into a cache of bounded size, in an order that does not depend on restarts."""

from __future__ import annotations

import io
import itertools
import pickle
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from restarts import samples

from localign.data.decoding import read_image
from localign.data.images import ImageData
from localign.data.loader import TrainLoader
from localign.data.sources import ImageSource, ParquetSource, open_source, remote
from localign.data.sources.remote import StreamedTarSource
from localign.data.stream import sample_stream
from localign.data.transforms import TrainTransform
from localign.datatools.shard import write_shards
from localign.errors import RunFailure, UserError
from localign.options.data import DataConfig
from localign.options.datatools import ShardConfig

NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_DELAYS", (0.0, 0.0))
    return tmp_path / "cache"


@pytest.fixture
def bucket() -> str:
    """The URL of an empty remote folder."""
    return f"memory://bucket-{next(NUMBERS)}"


def upload(folder: Path, bucket: str, pattern: str = "*") -> str:
    for file in (path for path in folder.glob(pattern) if path.is_file()):
        with fsspec.open(f"{bucket}/{file.name}", "wb") as out:
            out.write(file.read_bytes())
    return bucket


@pytest.fixture
def packed(pictures: Path, tmp_path: Path, bucket: str) -> str:
    """Six remote shards of the pictures, made by `localign data shard`."""
    write_shards(ShardConfig(source=str(pictures), out=str(tmp_path / "packed"), shard_images=4, workers=0))
    return upload(tmp_path / "packed", bucket)


def contents(source: ImageSource) -> dict[str, bytes]:
    return {source.name(i): source.load(i).tobytes() for i in range(len(source))}


def test_the_images_are_those_of_the_folder(
    packed: str, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(packed)
    assert isinstance(source, StreamedTarSource)
    assert contents(source) == contents(open_source(str(pictures)))
    assert capsys.readouterr().err == ""  # the index was in the shards' folder
    assert open_source(f"{packed}/{{000000..000005}}.tar").fingerprint() == source.fingerprint()
    assert open_source(f"{packed}/*.tar").fingerprint() == source.fingerprint()
    travelled = pickle.loads(pickle.dumps(source))
    assert travelled.load(5).tobytes() == source.load(5).tobytes()


@pytest.mark.parametrize("damage", ["missing", "other", "objects", "rubbish", "numbers"])
def test_without_a_matching_index_the_shards_are_indexed_once(
    packed: str, pictures: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"{packed}/index.npz"
    with fsspec.open(path, "rb") as file:
        arrays = dict(np.load(io.BytesIO(file.read())))
    fsspec.filesystem("memory").rm(path)
    if damage != "missing":
        out = io.BytesIO()
        if damage == "other":
            arrays["about"] = np.frombuffer(b'{"digest": "other", "problems": []}', np.uint8)
        elif damage == "objects":
            arrays["records"] = np.array([object], dtype=object)
        elif damage == "numbers":
            arrays["records"] = arrays["records"] + 1000
        np.savez(out, **arrays)
        with fsspec.open(path, "wb") as file:
            file.write(b"rubbish" if damage == "rubbish" else out.getvalue())
    assert contents(open_source(packed)) == contents(open_source(str(pictures)))
    assert "indexing 6 shards" in capsys.readouterr().err
    open_source(packed)
    assert capsys.readouterr().err == ""  # it is cached


def test_shards_that_changed_at_their_url_are_fetched_again(packed: str, pictures: Path) -> None:
    open_source(packed).load(0)  # puts its shard into the cache
    files = sorted(pictures.rglob("*.jpg"))
    with fsspec.open(f"{packed}/000000.tar", "wb") as out, tarfile.open(fileobj=out, mode="w") as tar:
        for file in files:  # more than before, because changes are detected by size
            tar.add(file, f"another-{file.name}")
    source = open_source(packed)
    assert source.name(0) == "another-00.jpg"
    assert source.load(0).tobytes() == read_image(files[0], "another-00.jpg").tobytes()


def test_the_cache_holds_a_bounded_number_of_shards(
    packed: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WINDOW", 1)
    source = open_source(packed)
    for index in sample_stream(source, 0).indices(0, 46):
        source.load(int(index))
    assert len(list((cache / "localign" / "shards").rglob("*.tar"))) == 4
    assert not list(cache.rglob("*.tmp"))


def test_shards_come_one_after_the_other_in_a_new_order_each_epoch(
    packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WINDOW", 2)
    source = open_source(packed)
    shard = source.index.records[:, 2]  # type: ignore[attr-defined]
    epochs = [sample_stream(source, 7).indices(23 * e, 23 * e + 23) for e in range(3)]
    orders = []
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(23))
        orders.append(
            set(shard[epoch[:7]])
        )  # from two of the six shards; one shard holds four images at most
        assert len(orders[-1]) == 2
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_three_restarts_on_other_ranks_and_workers_change_nothing(
    packed: str, rows: Path, bucket: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WINDOW", 2)
    spec = packed if kind == "tar" else upload(rows, f"{bucket}-rows", "*.parquet")
    whole = samples(lambda: open_source(spec), 0, 8, 1, 0)
    assert len(whole) == 96
    parts: dict[int, tuple[int, bytes]] = {}
    for start, end, world, workers in ((0, 3, 2, 0), (3, 4, 1, 2), (4, 6, 3, 1), (6, 8, 6, 0)):
        parts |= samples(lambda: open_source(spec), start, end, world, workers)
    assert parts == whole


def test_remote_parquet_is_read_by_row_groups(rows: Path, bucket: str, pictures: Path) -> None:
    source = open_source(upload(rows, bucket, "*.parquet"))
    assert isinstance(source, ParquetSource)
    assert list(contents(source).values()) == list(contents(open_source(str(pictures))).values())
    assert source.fingerprint() == open_source(str(rows)).fingerprint()
    assert "each loader worker fetches every row group" in source.notice


def test_file_urls_are_remote_shards_too(shards: Path, pictures: Path) -> None:
    assert contents(open_source(f"file://{shards}")) == contents(open_source(str(pictures)))


def test_the_notice_is_printed_before_a_run_starts(
    packed: str, tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ImageData(DataConfig(data=packed), (8, 8))
    said = capsys.readouterr().err
    assert "6 shards are fetched from memory://" in said
    assert "resumes exactly at its sample" in said
    (tmp_path / "m.yaml").write_text(f"mixture: [{{data: '{packed}'}}, {{data: {rows}}}]")
    ImageData(DataConfig(data=str(tmp_path / "m.yaml")), (8, 8))
    said = capsys.readouterr().err
    assert "6 shards are fetched" in said
    assert "row groups of up to 5 images" in said


@pytest.mark.parametrize("workers", [0, 1])
def test_a_permanent_failure_ends_the_run_and_skips_no_image(
    packed: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(packed)
    fsspec.filesystem("memory").rm(f"{packed}/000002.tar")
    loader = TrainLoader(
        source, TrainTransform(8), seed=0, global_batch=23, micro_batch=23, end_step=1, workers=workers
    )
    with pytest.raises(RunFailure, match=r"^cannot read memory:///bucket-\d+/000002\.tar: .*000002\.tar$"):
        list(loader)


def test_a_failed_request_is_retried(packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(packed)
    plain = MemoryFileSystem.get_file
    failed: list[str] = []

    def breaking(self: MemoryFileSystem, path: str, target: str, **options: Any) -> Any:
        if not failed:
            failed.append(path)
            Path(target).write_bytes(b"half")
            raise ConnectionError("reset by peer")
        return plain(self, path, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", breaking)
    assert source.load(0).size == (40, 30)
    assert failed


def test_a_shard_that_changed_since_the_start_ends_the_run(packed: str) -> None:
    source = open_source(packed)
    with fsspec.open(f"{packed}/000000.tar", "wb") as file:
        file.write(b"x" * 100)
    with pytest.raises(RunFailure, match=r"received 100 bytes instead of \d+$"):
        source.load(0)


class Slow:
    """Records the requests to a file system, counts concurrent requests, and delays each request."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.under_way = self.most = 0
        self.lock = threading.Lock()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(filesystem: Any, path: str, *args: Any, **options: Any) -> Any:
            with self.lock:
                self.asked.append(path.rpartition("/")[2])
                self.under_way += 1
                self.most = max(self.most, self.under_way)
            time.sleep(0.1)
            with self.lock:
                self.under_way -= 1
            return function(filesystem, path, *args, **options)

        return slowly


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    counter = Slow()
    for name in ("info", "_open"):
        monkeypatch.setattr(MemoryFileSystem, name, counter.around(getattr(MemoryFileSystem, name)))
    return counter


@pytest.fixture
def many(bucket: str) -> list[str]:
    """URLs of eighty files, each one byte larger than the previous file."""
    urls = [f"{bucket}/{number:03}.tar" for number in range(80)]
    for number, url in enumerate(urls):
        fsspec.filesystem("memory").pipe(url, bytes(number))
    return urls


def test_the_sizes_of_many_shards_are_requested_concurrently(
    many: list[str], slow: Slow, bucket: str
) -> None:
    assert remote.sizes_of(many) == list(range(80))
    assert sorted(slow.asked) == [f"{number:03}.tar" for number in range(80)]  # once each
    assert 8 < slow.most <= remote.MAX_CONCURRENT
    for gone in ("017", "005"):
        fsspec.filesystem("memory").rm(f"{bucket}/{gone}.tar")
    with pytest.raises(UserError, match=r"^there is no memory://bucket-\d+/005\.tar$"):  # the first in order
        remote.sizes_of(many)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_remote_source_opens_with_concurrent_requests(
    packed: str, rows: Path, bucket: str, kind: str, slow: Slow
) -> None:
    at = packed if kind == "tar" else upload(rows, f"{bucket}-rows", "*.parquet")
    name = "{000000..000005}.tar" if kind == "tar" else "train-{0..1}.parquet"
    slow.most = 0
    source = open_source(f"{at}/{name}")
    assert slow.most >= 2
    assert source.fingerprint() == open_source(at).fingerprint()


def test_bad_urls_are_refused_in_one_line(bucket: str, shards: Path) -> None:
    for spec, line in (
        (f"{bucket}/x.tar", "there is no memory://.*x.tar"),
        (f"{bucket}/*.tar", "no .tar or .parquet file matches"),
        (bucket, "no .tar or .parquet file matches"),
        ("nonsense://x/y.tar", "cannot reach nonsense://x/y.tar: Protocol not known"),
        (f"{bucket}/{{a.tar,b.parquet}}", "must match only .tar or only .parquet files"),
    ):
        with pytest.raises(UserError, match=line):
            open_source(spec)
