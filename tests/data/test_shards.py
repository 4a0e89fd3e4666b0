"""Tar shards give the images of the folder from which they were packed, and skip all other members."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localign.data import decoding
from localign.data.loader import TrainLoader
from localign.data.sources import FolderSource, TarSource, UnreadableImage, open_source, tar_index
from localign.data.transforms import TrainTransform
from localign.errors import UserError


def jpeg(seed: int = 0, side: int = 32) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def names_of(source: object) -> list[str]:
    return [source.name(i) for i in range(len(source))]  # type: ignore[attr-defined, arg-type]


def index_folder(folder: Path) -> Path:
    [found] = folder.glob(".localign-index-*")
    return found


def test_shards_hold_the_images_of_the_folder_they_were_made_of(pictures: Path, shards: Path) -> None:
    folder, tar = open_source(str(pictures)), open_source(str(shards))
    assert isinstance(tar, TarSource)
    assert names_of(tar) == names_of(folder)
    for i in range(len(folder)):
        assert np.array_equal(np.asarray(tar.load(i)), np.asarray(folder.load(i)))
        assert np.array_equal(tar.pixels(i).permute(1, 2, 0), np.asarray(folder.load(i)))
    with pytest.raises(IndexError):
        tar.name(len(tar))


@pytest.mark.parametrize(
    "pattern", ["part-{000..002}.tar", "part-*.tar", "part-{000,001,002}.tar", "*.tar", ""]
)
def test_every_way_of_naming_the_shards_gives_the_same(shards: Path, pattern: str) -> None:
    source, again = open_source(str(shards / pattern)), open_source(str(shards))
    assert source.fingerprint() == again.fingerprint()
    assert names_of(source) == names_of(again)


def test_one_shard_alone_and_one_that_is_not_there(shards: Path) -> None:
    assert len(open_source(str(shards / "part-001.tar"))) == 9
    with pytest.raises(UserError, match=r"part-003\.tar: No such file"):
        open_source(str(shards / "part-{000..003}.tar"))
    with pytest.raises(UserError, match="no file matches"):
        open_source(str(shards / "none-*.tar"))
    with pytest.raises(UserError, match="expands to more than"):
        open_source(str(shards / "{000000..999999}-{0..9}.tar"))


def test_a_folder_that_holds_images_too_stays_a_folder_of_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", jpeg())])
    (tmp_path / "notes.json").write_text("{}")
    assert isinstance(open_source(str(tmp_path)), TarSource)
    (tmp_path / "b.jpg").write_bytes(jpeg())
    assert isinstance(open_source(str(tmp_path)), FolderSource)


def test_the_index_is_built_once_and_pickled_as_a_path(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = TarSource(sorted(shards.glob("*.tar")))
    monkeypatch.setattr(tar_index, "scan_shard", None)  # a second scan would fail
    again = TarSource(sorted(shards.glob("*.tar")))
    assert isinstance(again.index.records.base, np.memmap)
    travelled = pickle.loads(pickle.dumps(again))
    assert len(pickle.dumps(again)) < 2000
    for source in (again, travelled):
        assert source.fingerprint() == first.fingerprint()
        assert source.load(20).tobytes() == first.load(20).tobytes()


@pytest.mark.parametrize("damage", ["cut", "text", "numbers", "json", "gone", "version"])
def test_a_damaged_index_is_rebuilt(tmp_path: Path, damage: str) -> None:
    shard = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", jpeg(i)) for i in range(5)])
    names = names_of(TarSource([shard]))
    folder = index_folder(tmp_path)
    records = folder / "records.npy"
    if damage == "cut":
        records.write_bytes(records.read_bytes()[:-9])
    elif damage == "text":
        (folder / "names.npy").write_text("no array")
    elif damage == "numbers":
        np.save(records, -np.load(records))
    elif damage == "json":
        (folder / "index.json").write_text("[1")
    elif damage == "gone":
        records.unlink()
    else:
        about = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(about | {"digest": "of another version"}))
    again = TarSource([shard])
    assert names_of(again) == names == [f"{i}.jpg" for i in range(5)]
    assert again.encoded(4) == jpeg(4)
    assert np.load(records).shape == (5, 4)  # and saved


def test_an_index_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg())])
    TarSource([shard])
    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return os.mkdir, (str(mark),)

    np.save(index_folder(tmp_path) / "records.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    assert len(TarSource([shard])) == 1
    assert not mark.exists()


def test_changed_shards_are_indexed_again_and_have_another_fingerprint(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg(0))])
    before = TarSource([shard]).fingerprint()
    write_tar(shard, [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1))])
    after = TarSource([shard])
    assert names_of(after) == ["a.jpg", "b.jpg"]
    assert after.fingerprint() != before
    assert TarSource([shard], (8, 8)).fingerprint() != after.fingerprint()


def test_the_index_of_a_read_only_folder_goes_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg())])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, second = tar_index._index_folders([shard])
    monkeypatch.setattr(
        tar_index, "_index_folders", lambda shards: iter([tmp_path / "x.tar" / "never", second])
    )
    source = TarSource([shard])
    assert source.index.folder == second
    assert (tmp_path / "cache") in second.parents
    monkeypatch.setattr(tar_index, "_index_folders", lambda shards: iter([tmp_path / "x.tar" / "never"]))
    alone = pickle.loads(pickle.dumps(TarSource([shard])))  # an index in memory is pickled with its arrays
    assert alone.load(0).size == source.load(0).size


@pytest.mark.parametrize("name", ["../out.jpg", "/etc/x.jpg", "a/../../b.jpg", "../../notes.txt"])
def test_members_that_lead_out_of_their_shard_are_refused(tmp_path: Path, name: str) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.jpg", jpeg()), (name, jpeg())])
    with pytest.raises(
        UserError, match=r"x\.tar is refused: the name of its member .* leads out of the shard"
    ):
        TarSource([shard])


def test_links_are_named_as_unreadable_and_never_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(jpeg())
        tar.addfile(info, io.BytesIO(jpeg()))
        for name, kind, target in (
            ("b.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("c.jpg", tarfile.LNKTYPE, "a.jpg"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    source = TarSource([tmp_path / "x.tar"])
    assert names_of(source) == ["a.jpg"]
    assert [name for name, _ in source.unreadable] == ["b.jpg", "c.jpg"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read(tmp_path: Path, form: int) -> None:
    long = f"{'d' * 90}/{'e' * 60}/ü.jpg" if form != tarfile.USTAR_FORMAT else f"{'d' * 60}/{'e' * 60}/u.jpg"
    shard = write_tar(tmp_path / "x.tar", [("./a.jpg", jpeg(0)), (long, jpeg(1)), ("d/._a.jpg", b"x")], form)
    source = TarSource([shard])
    assert names_of(source) == ["a.jpg", long]
    assert source.encoded(1) == jpeg(1)


@pytest.mark.parametrize("cut", [100, 512 + 100, 3 * 1024, -2048])
def test_a_truncated_shard_keeps_what_is_whole_and_is_named(tmp_path: Path, cut: int) -> None:
    write_tar(tmp_path / "x.tar", [(f"{i}.jpg", jpeg(i)) for i in range(8)])
    data = (tmp_path / "x.tar").read_bytes()
    data = data[: data.index(b"\0" * 1024)] if cut == -2048 else data
    (tmp_path / "x.tar").write_bytes(data[:cut] if cut != -2048 else data)
    if cut == 100:
        with pytest.raises(UserError, match=r"x\.tar is not a readable tar file"):
            TarSource([tmp_path / "x.tar"])
        return
    source = TarSource([tmp_path / "x.tar"])
    readable = 0
    for i in range(len(source)):
        with suppress(UnreadableImage):
            readable += source.load(i).size == (32, 32)
    assert readable == (8 if cut == -2048 else cut // (len(data) // 8))
    if cut != -2048:
        assert [name for name, _ in source.unreadable] == ["x.tar"]
        assert "truncated after" in source.unreadable[0][1]


def test_rubbish_after_some_members_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1))])
    with tarfile.open(tmp_path / "x.tar") as tar:
        second = tar.getmembers()[1].offset
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[second : second + 512] = bytes(range(256)) * 2
    (tmp_path / "x.tar").write_bytes(bytes(data))
    source = TarSource([tmp_path / "x.tar"])
    assert names_of(source) == ["0.jpg"]
    assert source.unreadable[0][0] == "x.tar"


def test_compressed_and_empty_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.add(__file__, "a.jpg")
    with pytest.raises(UserError, match="uncompressed"):
        TarSource([tmp_path / "x.tar"])
    write_tar(tmp_path / "y.tar", [("a.txt", b"text")])
    with pytest.raises(UserError, match="the shard holds no images"):
        TarSource([tmp_path / "y.tar"])


def test_a_corrupt_member_is_skipped_counted_and_named(tmp_path: Path) -> None:
    members = [(f"{i:02}.jpg", jpeg(i)) for i in range(20)]
    members[5] = ("05.jpg", jpeg(5)[:200])
    members[6] = ("06.jpg", b"")
    source = TarSource([write_tar(tmp_path / "x.tar", members)])
    loader = TrainLoader(
        source, TrainTransform(8), seed=0, global_batch=8, micro_batch=4, end_step=5, max_bad_share=0.1
    )
    assert sum(len(batch.images) for batch in loader) == 40
    assert set(loader.bad.reasons) == {"05.jpg", "06.jpg"}
    assert loader.bad.reasons["06.jpg"] == "empty file"


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TarSource([write_tar(tmp_path / "x.tar", [("a.jpg", jpeg())])])
    monkeypatch.setattr(decoding, "MAX_BYTES", 100)
    with pytest.raises(UnreadableImage, match=r"the limit is 100$"):
        source.load(0)
    (tmp_path / "b.jpg").write_bytes(jpeg())
    with pytest.raises(UnreadableImage, match=r"the limit is 100$"):
        FolderSource(tmp_path).load(0)


def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    shards = [write_tar(tmp_path / f"{i:03}.tar", [(f"{i}.jpg", jpeg(i))]) for i in range(70)]
    source = TarSource(shards)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert [source.load(i).size for i in (*range(70), 0)] == [(32, 32)] * 71
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 64
