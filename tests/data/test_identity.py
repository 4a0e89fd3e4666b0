"""A sample is known by its shard and its name, a file by its path: in counts, logs, lists and new shards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from localign.cli import main
from localign.data.classification import labels_of
from localign.data.image_source import ImageSource
from localign.data.loader import TrainLoader
from localign.data.sources import EncodedSource, open_source
from localign.data.sources.layouts.identity import short_names
from localign.data.transforms import TrainTransform
from localign.errors import UserError


def png(level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def names(source: ImageSource) -> list[str]:
    return [source.name(i) for i in range(len(source))]


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """Two shards that both hold the samples 000 to 002; 001 of the first is damaged, and 002 of the second."""
    for shard in range(2):
        members = {f"{i:03}.png": png(10 * shard + i) for i in range(3)}
        members[f"{1 + shard:03}.png"] = b"no image"
        write_tar(tmp_path / "twins" / f"{shard:06}.tar", members)
    return tmp_path / "twins"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["d/0.tar", "d/1.tar"], ["0.tar", "1.tar"]),
        (["a/0.tar", "b/0.tar"], ["a/0.tar", "b/0.tar"]),
        (["x/a/c/0.tar", "x/b/c/0.tar", "x/b/c/1.tar"], ["a/c/0.tar", "b/c/0.tar", "b/c/1.tar"]),
        (["s3://b/a/0.tar?v=1", "s3://b/c/0.tar?v=2"], ["a/0.tar", "c/0.tar"]),
        (["0.tar", "0.tar"], ["0.tar", "0.tar"]),
        (["d/a/0.tar", "d/0.tar"], ["a/0.tar", "d/0.tar"]),
        ([], []),
    ],
)
def test_short_names_tell_shards_apart(paths: list[str], expected: list[str]) -> None:
    assert short_names(paths) == expected


def test_names_have_the_shard_where_they_repeat(twins: Path) -> None:
    source = open_source(str(twins))
    assert names(source)[2:4] == ["000000.tar:002.png", "000001.tar:000.png"]
    assert source.place(3) == ("000001.tar", "000.png")
    assert names(open_source(str(twins / "000000.tar"))) == ["000.png", "001.png", "002.png"]
    assert names(open_source(str(twins)))[0] == "000000.tar:000.png"  # from the saved index


def test_bad_images_of_one_name_are_counted_and_named_apart(twins: Path) -> None:
    write_tar(twins / "000001.tar", {f"{i:03}.png": png() if i != 1 else b"no image" for i in range(3)})
    source = open_source(str(twins))
    loader = TrainLoader(
        source, TrainTransform(4), seed=0, global_batch=6, micro_batch=6, end_step=2, max_bad_share=0.5
    )
    assert sum(len(batch.images) for batch in loader) == 12
    assert set(loader.bad.reasons) == {"000000.tar:001.png", "000001.tar:001.png"}


def test_verify_lists_shards_and_the_list_is_read_back(twins: Path, tmp_path: Path) -> None:
    listed = tmp_path / "bad.jsonl"
    assert main(["data", "verify", str(twins), "--out", str(listed), "--workers", "0"]) == 1
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(e["shard"], e["path"]) for e in entries] == [
        ("000000.tar", "001.png"),
        ("000001.tar", "002.png"),
    ]
    source = open_source(str(twins), exclude=str(listed))
    assert names(source) == [f"00000{s}.tar:00{i}.png" for s, i in ((0, 0), (0, 2), (1, 0), (1, 1))]
    assert source.place(3) == ("000001.tar", "001.png")
    alone = open_source(
        str(twins / "000001.tar"), exclude=str(listed)
    )  # the list of both shards, used for one
    assert names(alone) == ["000.png", "001.png"]


@pytest.mark.parametrize(
    ("suffix", "content", "left"),
    [
        (".txt", "000000.tar:001.png\n", ["0:0", "0:2", "1:0", "1:1", "1:2"]),
        (".txt", "001.png\n", ["0:0", "0:2", "1:0", "1:2"]),  # an old list: by name alone
        (".jsonl", '{"path": "001.png", "reason": "?"}\n', ["0:0", "0:2", "1:0", "1:2"]),
        (".csv", "shard,path\n000001.tar,001.png\n", ["0:0", "0:1", "0:2", "1:0", "1:2"]),
        (".csv", "path,shard\n001.png,twins/000001.tar\n", ["0:0", "0:1", "0:2", "1:0", "1:2"]),
        (".jsonl", '{"path": "001.png", "shard": "/far/twins/000000.tar"}\n', ["0:0", "0:2", "1:0", "1:1", "1:2"]),
    ],
)  # fmt: skip
def test_lists_name_samples_with_or_without_shards(
    twins: Path, tmp_path: Path, suffix: str, content: str, left: list[str]
) -> None:
    listed = tmp_path / f"bad{suffix}"
    listed.write_text(content)
    source = open_source(str(twins), exclude=str(listed))
    assert names(source) == [f"00000{e[0]}.tar:00{e[2]}.png" for e in left]
    more = source.notice or ""
    assert ("1 more images than it has lines" in more) == ("shard" not in content and "tar" not in content)


def test_a_shard_that_may_be_one_of_two_is_refused(twins: Path, tmp_path: Path) -> None:
    for part in "ab":
        write_tar(tmp_path / "parts" / part / "0.tar", {"x.png": png(), "y.png": png()})
    pattern = str(tmp_path / "parts" / "{a,b}" / "0.tar")
    assert names(open_source(pattern)) == ["a/0.tar:x.png", "a/0.tar:y.png", "b/0.tar:x.png", "b/0.tar:y.png"]
    listed = tmp_path / "bad.csv"
    listed.write_text("shard,path\n0.tar,x.png\n")
    with pytest.raises(UserError, match=r"names the shard 0\.tar, which may be a/0\.tar or b/0\.tar"):
        open_source(pattern, exclude=str(listed))
    listed.write_text("shard,path\nc.tar,x.png\n")
    with pytest.raises(UserError, match=r"names no image of the data: 'c\.tar:x\.png'"):
        open_source(pattern, exclude=str(listed))


@pytest.mark.parametrize("folder", ["", "cat/"])
def test_shards_of_equal_names_are_packed(tmp_path: Path, folder: str) -> None:
    """The shard goes in front of the file name, and makes neither a class nor a longer field."""
    for shard in ("part.v1", "part.v2"):
        write_tar(tmp_path / "in" / f"{shard}.tar", {f"{folder}000.png": png(), "dog/001.png": png(1)})
    out = tmp_path / "out"
    assert main(["data", "shard", str(tmp_path / "in"), str(out), "--workers", "0"]) == 0
    source = open_source(str(out))
    expected = [f"{folder}part_v{n}-000.png" for n in (1, 2)] + [f"dog/part_v{n}-001.png" for n in (1, 2)]
    assert sorted(names(source)) == sorted(expected)
    if folder:
        assert labels_of(source, "out").classes == ("cat", "dog")


def test_shards_of_distinct_names_are_packed_as_before(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / "in" / f"{shard}.tar", {f"{shard}.png": png(shard)})
    assert main(["data", "shard", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0"]) == 0
    assert sorted(names(open_source(str(tmp_path / "out")))) == ["0.png", "1.png"]


def test_classes_in_tar_files_of_equal_member_names(tmp_path: Path) -> None:
    for label in ("n01", "n02"):
        write_tar(tmp_path / "tars" / f"{label}.tar", {f"{i}.png": png(i) for i in range(4)})
    argv = ["data", "in21k-p", str(tmp_path / "tars"), str(tmp_path / "out"), "--min-images", "3"]
    assert main([*argv, "--val-images", "1", "--workers", "0"]) == 0
    found = names(open_source(str(tmp_path / "out" / "train")))
    assert len(found) == 6
    assert {name.split("/")[0] for name in found} == {"n01", "n02"}


def test_an_image_listed_twice_is_named_in_the_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "list.txt").write_text("a.png\na.png\n")
    assert main(["data", "shard", str(tmp_path / "list.txt"), str(tmp_path / "out"), "--workers", "0"]) == 2
    assert "such as a.png; list every image once" in capsys.readouterr().err


def test_files_are_excluded_by_their_absolute_path(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png())
    (tmp_path / "bad.txt").write_text(f"{tmp_path}/images/a.png\n")
    assert names(open_source(str(tmp_path / "images"), exclude=str(tmp_path / "bad.txt"))) == ["b.png"]


def test_parquet_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        pq.write_table(pa.table({"image": [png(1), b"no image"]}), tmp_path / part / "0.parquet")
    source = open_source(str(tmp_path / "{train,test}" / "0.parquet"))
    assert isinstance(source, EncodedSource)
    assert names(source) == ["train/0.parquet:0", "train/0.parquet:1", "test/0.parquet:0", "test/0.parquet:1"]
    (tmp_path / "bad.txt").write_text("test/0.parquet:1\n")
    left = open_source(str(tmp_path / "{train,test}" / "0.parquet"), exclude=str(tmp_path / "bad.txt"))
    assert names(left) == ["train/0.parquet:0", "train/0.parquet:1", "test/0.parquet:0"]
