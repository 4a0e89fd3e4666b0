"""A sample of a tar shard has a key and fields, as the webdataset library defines them, and one image."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localign.cli import main
from localign.data.classification import ClassLabels, labels_of
from localign.data.image_source import ImageSource
from localign.data.sources import TarSource, open_source
from localign.data.sources.layouts.webdataset import split_name
from localign.errors import UserError


def image(kind: str = "PNG", level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: Sequence[str | tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, member in enumerate(members):
            name, data = (member, image(level=number)) if isinstance(member, str) else member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def names(source: ImageSource) -> list[str]:
    return [source.name(i) for i in range(len(source))]


@pytest.mark.parametrize(
    ("name", "key", "field"),
    [
        ("000.jpg", "000", "jpg"),
        ("000.SEG.Png", "000", "seg.png"),
        ("n01.x/000.jpg", "n01.x/000", "jpg"),
        ("a.b/c.d/000.json", "a.b/c.d/000", "json"),
        ("plain", "plain", ""),
        ("d/.hidden.jpg", "d/.hidden.jpg", ""),
    ],
)
def test_a_key_ends_at_the_first_dot_of_the_base_name(name: str, key: str, field: str) -> None:
    assert split_name(name) == (key, field)


@pytest.mark.parametrize(
    ("members", "chosen"),
    [
        (["0.jpg", "0.seg.png", "1.jpg", "1.seg.png"], ["0.jpg", "1.jpg"]),
        (["0.seg.png", "0.jpg", "1.seg.png", "1.jpg"], ["0.jpg", "1.jpg"]),
        (["0.jpg", "0.png", "1.png", "1.jpg"], ["0.jpg", "1.jpg"]),  # a label map as PNG
        (["0.jpg", "1.jpg", "0.seg.png", "1.seg.png"], ["0.jpg", "1.jpg"]),  # all maps after all images
        (["0.JPG", "0.Mask.PNG"], ["0.JPG"]),
        (["0.jpg", "0.mask.png", "1.mask.png"], ["0.jpg"]),  # a map that has lost its image
        (["0.jpg", "0.thumb.jpg", "1.thumb.jpg", "2.jpg"], ["0.jpg", "2.jpg"]),
        (["0.image.jpg", "0.seg.png", "1.image.jpg", "1.seg.png"], ["0.image.jpg", "1.image.jpg"]),
        (["x.y/0.png", "x.y/1.png", "x.z/0.png"], ["x.y/0.png", "x.y/1.png", "x.z/0.png"]),
        (["cat.0.jpg", "cat.1.jpg", "dog.0.jpg"], ["cat.0.jpg", "cat.1.jpg", "dog.0.jpg"]),
        (["2017.12.03.jpg", "2017.12.04.jpg", "2018.jpg"], ["2017.12.03.jpg", "2017.12.04.jpg", "2018.jpg"]),
        (["0.png", "1.webp", "2.jpeg"], ["0.png", "1.webp", "2.jpeg"]),
        (["0.jpg", "0.jpg"], ["0.jpg", "0.jpg"]),
    ],
)
def test_a_sample_has_one_image_and_it_is_no_label_map(
    tmp_path: Path, members: list[str], chosen: list[str]
) -> None:
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    assert names(source) == chosen
    levels = [int(np.asarray(source.load(i))[0, 0, 0]) for i in range(len(source))]
    assert levels == [members.index(name) + chosen[:i].count(name) for i, name in enumerate(chosen)]
    again = open_source(str(tmp_path / "x.tar"))  # from the saved index
    assert (names(again), again.notice) == (names(source), source.notice)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    source = open_source(str(write_tar(tmp_path / "x.tar", ["0.jpg", "0.seg.png", "1.jpg"])))
    assert source.notice is not None
    assert "1 seg.png" in source.notice
    assert open_source(str(write_tar(tmp_path / "y.tar", ["0.jpg"]))).notice is None


def test_companions_in_one_shard_are_no_images_of_another(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", ["0.edges.png", "1.edges.png"])
    write_tar(tmp_path / "1.tar", ["2.jpg", "2.edges.png"])
    assert names(open_source(str(tmp_path))) == ["2.jpg"]


@pytest.mark.parametrize(
    ("field", "chosen"),
    [
        ("png", ["0.png", "1.png"]),
        ("jpg", ["0.jpg"]),
        ("jpg,png", ["0.jpg", "1.png"]),
        ("png, jpg", ["0.png", "1.png"]),
        (".PNG", ["0.png", "1.png"]),
        ("seg.png", ["0.seg.png"]),
        ("img", ["2.img"]),
        ("*", ["0.jpg", "0.png", "0.seg.png", "1.png"]),
    ],
)
def test_fields_are_chosen_in_the_given_order(tmp_path: Path, field: str, chosen: list[str]) -> None:
    write_tar(tmp_path / "x.tar", ["0.jpg", "0.png", "0.seg.png", "1.png", "2.img"])
    for _ in range(2):
        assert names(open_source(str(tmp_path / "x.tar"), field=field)) == chosen
        assert names(open_source(str(tmp_path / "x.tar"))) == ["0.jpg", "1.png"]


def test_fields_that_do_not_exist_or_do_not_apply_are_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", ["0.jpg", "0.seg.png"])
    with pytest.raises(UserError, match=r"holds no field webp; the fields are jpg, seg\.png"):
        open_source(str(tmp_path / "x.tar"), field="webp")
    with pytest.raises(UserError, match="--field names fields such as jpg,png"):
        open_source(str(tmp_path / "x.tar"), field="jpg,,png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="--field applies to tar shards and parquet files"):
        open_source(str(tmp_path), field="png")
    two = [f"{n}.{field}.jpg" for n in range(3) for field in ("left", "right")]
    write_tar(tmp_path / "y.tar", two)
    with pytest.raises(UserError, match=r"several images: left\.jpg, right\.jpg; choose with --field"):
        open_source(str(tmp_path / "y.tar"))
    assert len(open_source(str(tmp_path / "y.tar"), field="left.jpg")) == 3
    assert len(open_source(str(tmp_path / "y.tar"), field="*")) == 6


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([("0.cls", b"7\n"), ("1.cls", b"3")], ["7", "3"]),
        ([("0.cls", b"10"), ("1.cls", b"9")], ["10", "9"]),
        ([("0.json", b'{"label": "cat"}'), ("1.json", b'{"label": "dog", "id": 3}')], ["cat", "dog"]),
        ([("0.json", b'{"class": 1}'), ("1.json", b'{"class": 0}')], ["1", "0"]),
        ([("0.cls", b"1"), ("0.json", b'{"label": 5}'), ("1.json", b'{"label": 5}'), ("1.cls", b"2")], ["1", "2"]),
    ],
)  # fmt: skip
def test_labels_are_read_from_the_samples(
    tmp_path: Path, labels: list[tuple[str, bytes]], classes: list[str]
) -> None:
    write_tar(tmp_path / "x.tar", ["0.jpg", "0.seg.png", *labels, "1.jpg"])
    for _ in range(2):
        found = labels_of(open_source(str(tmp_path / "x.tar")), "x.tar")
        assert isinstance(found, ClassLabels)
        assert [found.classes[code] for code in found.codes] == classes
        assert list(found.classes) == sorted(classes, key=lambda c: int(c) if c.isdigit() else c)


@pytest.mark.parametrize(
    "members",
    [
        [("0.cls", b"1")],
        [("0.cls", b"1"), ("1.cls", b"")],
        [("0.json", b'{"label": 1}'), ("1.json", b'{"label": NaN}')],
        [("0.json", b'{"label": 1}'), ("1.json", b'{"label": [1]}')],
        [("0.json", b'{"label": 1}'), ("1.json", b"[" * 100_000)],
    ],
)
def test_a_sample_without_label_is_named(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    source = open_source(str(write_tar(tmp_path / "x.tar", ["0.jpg", *members, "1.jpg"])))
    assert len(source) == 2
    with pytest.raises(UserError, match=r"some samples of x\.tar have a label, but 1\.jpg has none"):
        labels_of(source, "x.tar")


def test_samples_with_labels_are_packed_into_class_folders(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", ["0.jpg", ("0.cls", b"1"), "0.seg.png", "1.jpg", ("1.cls", b"0")])
    out = str(tmp_path / "out")
    assert main(["data", "shard", str(tmp_path / "x.tar"), out, "--workers", "0", "--field", "jpg"]) == 0
    assert sorted(names(open_source(out))) == ["0/1.jpg", "1/0.jpg"]


def test_every_file_of_packed_shards_is_an_image_as_before(tmp_path: Path) -> None:
    """`data shard` gives every image a name of its own, with dots or not; a folder may hold a.jpg and a.png."""
    (tmp_path / "in").mkdir()
    files = ["a.jpg", "a.png", "b.v1.png", "b.v2.png", "c.mask.png"]
    for name in files:
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / name)
    argv = ["data", "shard", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0"]
    assert main(argv) == 0
    source = open_source(str(tmp_path / "out"))
    assert sorted(names(source)) == files
    assert isinstance(source, TarSource)
    assert len(open_source(str(tmp_path / "out" / "000000.tar"))) == 5
