"""`localign data`: shards hold their source's images, with reproducible bytes; bad images are found and left out."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localign.cli import main, parse
from localign.data.classification import labels_of
from localign.data.loader import TrainLoader
from localign.data.sources import EncodedSource, ImageSource, TarSource, open_source
from localign.data.sources.layouts.packed import ShardRecord
from localign.data.transforms import TrainTransform
from localign.datatools import packing
from localign.datatools.in21k import write_in21k
from localign.datatools.packing import member_name
from localign.datatools.shard import write_shards
from localign.errors import UserError
from localign.options.datatools import In21kConfig, ShardConfig


def contents(source: ImageSource) -> dict[str, bytes]:
    assert isinstance(source, EncodedSource)
    return {source.name(i): source.encoded(i) for i in range(len(source))}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_files_are_those_of_the_folder(
    pictures: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "data",
        "shard",
        str(pictures),
        str(tmp_path / "out"),
        "--shard-images",
        "9",
        "--workers",
        str(workers),
    ]
    assert main(argv) == 0
    assert "23 images" in capsys.readouterr().out
    source = open_source(str(tmp_path / "out"))
    assert isinstance(source, TarSource)
    assert [p.name for p in source.shards] == ["000000.tar", "000001.tar", "000002.tar"]
    assert contents(source) == contents(open_source(str(pictures)))
    assert [source.name(i) for i in range(23)] != sorted(source.name(i) for i in range(23))
    labels = labels_of(source, "out")
    assert labels.classes == ("cat", "dog")
    records = [json.loads(line) for line in (tmp_path / "out" / "shards.jsonl").read_text().splitlines()]
    assert [r["images"] for r in records] == [9, 9, 5]
    assert [packing.sha256(tmp_path / "out" / r["shard"]) for r in records] == [r["sha256"] for r in records]
    assert not (tmp_path / "out.partial").exists()
    assert main(argv) == 0  # the shards exist already
    assert main([*argv[:4], "--shard-images", "8"]) == 2
    assert "holds something else" in capsys.readouterr().err


def test_an_interrupted_packing_goes_on_and_ends_the_same(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(out: str) -> ShardConfig:
        return ShardConfig(
            source=str(pictures), out=str(tmp_path / out), shard_images=4, resize=16, workers=0
        )

    write_shards(config("whole"))
    plain = packing.Packing.__call__
    written: list[int] = []
    limit = 3

    def noted(self: packing.Packing, number: int) -> ShardRecord:
        if len(written) == limit:
            raise KeyboardInterrupt
        written.append(number)
        return plain(self, number)

    monkeypatch.setattr(packing.Packing, "__call__", noted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(config("again"))
    assert not (tmp_path / "again").exists()
    partial = tmp_path / "again.partial"
    assert len(list(partial.glob("*.tar"))) == 3
    (partial / "000001.tar").write_bytes(b"cut")  # an incomplete shard
    with open(partial / "shards.jsonl", "a") as file:
        file.write('{"shard": "0000')
    other = ShardConfig(
        source=str(pictures), out=str(tmp_path / "again"), shard_images=5, resize=16, workers=0
    )
    with pytest.raises(UserError, match=r"holds unfinished shards that differ in shard_images;"):
        write_shards(other)
    written.clear()
    limit = 100
    write_shards(config("again"))
    assert written == [1, 3, 4, 5]
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


def test_resizing_shrinks_the_short_side_and_leaves_out_unreadable_images(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    gradient = np.linspace(0, 255, 90 * 160 * 3).reshape(90, 160, 3).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / "in" / "a" / "wide.png")
    Image.fromarray(gradient[:20, :40]).save(tmp_path / "in" / "a" / "small.png")
    (tmp_path / "in" / "a" / "bad.jpg").write_bytes(b"\xff\xd8\xff no")
    about = write_shards(
        ShardConfig(source=str(tmp_path / "in"), out=str(tmp_path / "out"), resize=30, workers=0)
    )
    assert (about["images"], about["left_out"]) == (2, 1)
    assert json.loads((tmp_path / "out" / "left-out.jsonl").read_text())["path"] == "a/bad.jpg"
    source = open_source(str(tmp_path / "out"))
    sizes = {source.name(i): source.load(i).size for i in range(2)}
    assert sizes == {"a/wide.png.jpg": (53, 30), "a/small.png": (40, 20)}
    wide = next(i for i in range(2) if source.name(i) == "a/wide.png.jpg")
    expected = np.asarray(Image.fromarray(gradient).resize((53, 30), Image.Resampling.LANCZOS)).astype(int)
    assert abs(np.asarray(source.load(wide)).astype(int) - expected).mean() < 4  # JPEG


def test_lists_and_rows_keep_their_classes(pictures: Path, rows: Path, tmp_path: Path) -> None:
    lines = [f"{path},{path.parent.name}s" for path in sorted(pictures.rglob("*.jpg"))]
    (tmp_path / "all.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    write_shards(
        ShardConfig(
            source=str(tmp_path / "all.csv"), out=str(tmp_path / "list"), workers=0, allow_outside=True
        )
    )
    source = open_source(str(tmp_path / "list"))
    assert labels_of(source, "list").classes == ("cats", "dogs")
    write_shards(ShardConfig(source=str(rows), out=str(tmp_path / "rows"), workers=0))
    packed = open_source(str(tmp_path / "rows"))
    assert "dog/train-1/10.jpg" in {packed.name(i) for i in range(23)}
    assert sorted(contents(packed).values()) == sorted(contents(open_source(str(pictures))).values())
    (tmp_path / "twice.txt").write_text(f"{pictures}/cat/00.jpg\n" * 2)
    twice = ShardConfig(
        source=str(tmp_path / "twice.txt"), out=str(tmp_path / "twice"), workers=0, allow_outside=True
    )
    with pytest.raises(UserError, match="1 images would have the same name as another"):
        write_shards(twice)
    assert not (tmp_path / "twice.partial").exists()


def test_names_in_shards_are_relative_and_have_the_suffix_of_the_format() -> None:
    assert member_name("../../etc/x.jpg", "", b"\xff\xd8\xff") == "etc/x.jpg"
    assert member_name("/data/./x.png", "../cat", b"\x89PNG") == "cat/data/x.png"
    assert member_name("x.parquet:17", "", b"RIFF") == "x/17.webp"
    assert member_name("x.parquet:17", "", b"??") == "x/17.jpg"
    assert member_name("a.JPEG", "", b"\xff\xd8\xff") == "a.JPEG"


def broken(pictures: Path, folder: Path) -> Path:
    for path in pictures.rglob("*.jpg"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    (folder / "cat" / "03.jpg").write_bytes((pictures / "cat" / "03.jpg").read_bytes()[:900])
    (folder / "dog" / "15.jpg").write_bytes(b"")
    return folder


@pytest.mark.parametrize("workers", ["0", "2"])
def test_verify_lists_bad_images_and_training_leaves_them_out(
    pictures: Path, tmp_path: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, listed = broken(pictures, tmp_path / "data"), tmp_path / "bad.jsonl"
    assert main(["data", "verify", str(data), "--out", str(listed), "--workers", workers]) == 1
    assert "23 decoded, 2 bad" in capsys.readouterr().out
    bad = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [entry["path"] for entry in bad] == ["cat/03.jpg", "dog/15.jpg"]
    assert bad[1]["reason"] == "empty file"
    source = open_source(str(data), exclude=str(listed))
    loader = TrainLoader(
        source, TrainTransform(8), seed=0, global_batch=21, micro_batch=21, end_step=2, max_bad_share=0
    )
    assert sum(len(batch.images) for batch in loader) == 42
    assert main(["data", "verify", str(pictures), "--out", str(listed), "--workers", workers]) == 0
    assert len(open_source(str(pictures), exclude=str(listed))) == 23  # an empty list excludes nothing


def test_verify_compares_shards_with_their_checksums(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_shards(ShardConfig(source=str(pictures), out=str(out), shard_images=9, workers=0))
    argv = ["data", "verify", str(out), "--out", str(tmp_path / "bad.jsonl"), "--workers", "0"]
    assert main(argv) == 0
    assert "3 shards compared, 0 differ" in capsys.readouterr().out
    data = bytearray((out / "000001.tar").read_bytes())
    data[-1] ^= 1  # in the padding: every image still decodes
    (out / "000001.tar").write_bytes(bytes(data))
    assert main(argv) == 1
    said = capsys.readouterr().out
    assert "3 shards compared, 1 differ" in said
    assert "000001.tar" in said


def test_stats_count_and_measure(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = broken(pictures, tmp_path / "data")
    Image.new("RGB", (100, 50)).save(data / "dog" / "z.png")
    assert main(["data", "stats", str(data), "--workers", "0", "--out", str(tmp_path / "s.json")]) == 0
    said = capsys.readouterr().out
    assert "24; 1 of 24 opened images are unreadable" in said
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["formats"] == {"JPEG": 22, "PNG": 1}
    assert found["width"] == {
        "min": 40,
        "median": 40.0,
        "mean": pytest.approx((22 * 40 + 100) / 23),
        "max": 100,
    }
    assert found["classes"] == {"count": 2, "min": 10, "median": 12.0, "mean": 12.0, "max": 14}
    assert main(["data", "stats", str(data), "--workers", "0", "--images", "5"]) == 0
    assert "of 5 opened" in capsys.readouterr().out


def class_tars(root: Path, sizes: dict[str, int]) -> Path:
    root.mkdir()
    for name, count in sizes.items():
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            for i in range(count):
                file = io.BytesIO()
                Image.new("RGB", (40, 20), (i, len(name), 0)).save(file, "JPEG")
                info = tarfile.TarInfo(f"{name}_{i}.JPEG")
                info.size = file.tell()
                file.seek(0)
                tar.addfile(info, file)
    return root


def unpacked(tars: Path, folder: Path) -> Path:
    for path in tars.glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(folder / path.stem, filter="data")
    return folder


def test_in21k_p_keeps_large_classes_and_splits_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = class_tars(tmp_path / "tars", {"n01": 12, "n02": 9, "n03": 10, "n04": 30})
    folders = unpacked(tars, tmp_path / "folders")
    common = ["--min-images", "10", "--val-images", "3", "--workers", "0", "--resize", "10"]
    assert main(["data", "in21k-p", str(tars), str(tmp_path / "a"), *common]) == 0
    assert "3 of 4 have 10 images" in capsys.readouterr().out
    assert main(["data", "in21k-p", str(folders), str(tmp_path / "b"), *common]) == 0
    for part, counts in (("train", {"n01": 9, "n03": 7, "n04": 27}), ("val", {"n01": 3, "n03": 3, "n04": 3})):
        source = open_source(str(tmp_path / "a" / part))
        names = [source.name(i) for i in range(len(source))]
        found = {name: sum(n.startswith(f"{name}/{name}_") for n in names) for name in counts}
        assert found == counts
        assert sum(counts.values()) == len(names)
        assert all(source.load(i).size == (20, 10) for i in range(len(source)))
        assert names != sorted(names)
        # The same images whether a class came as a folder or as a tar file.
        other = open_source(str(tmp_path / "b" / part))
        assert contents(other) == contents(source)
    train, val = (set(contents(open_source(str(tmp_path / "a" / p)))) for p in ("train", "val"))
    assert not train & val
    write_in21k(
        In21kConfig(source=str(tars), out=str(tmp_path / "c"), min_images=10, val_images=3, seed=1, workers=0)
    )
    assert set(contents(open_source(str(tmp_path / "c" / "val")))) != val


def test_in21k_p_needs_classes_that_are_large_enough(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of 2 classes has 500 images; the largest class has 13"):
        write_in21k(In21kConfig(source=str(pictures), out=str(tmp_path / "x"), workers=0))
    with pytest.raises(UserError, match="must hold one folder or one tar file per class"):
        write_in21k(In21kConfig(source=str(pictures / "cat"), out=str(tmp_path / "x"), workers=0))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["data shard"], "no images given"),
        (["data shard", "scenes", "x"], "scenes are drawn on demand"),
        (["data shard", "a"], "no output folder given"),
        (["data shard", "a", "b", "--quality", "80"], "no effect without --resize"),
        (["data shard", "a", "b", "--resize", "0"], "--resize must be above 0"),
        (["data shard", "a", "b", "--resize", "9", "--quality", "101"], "--quality must lie in 1..100"),
        (["data shard", "a", "b", "--seed", "1", "--shuffle", "false"], "--seed has no effect"),
        (["data shard", "a", "b", "--shard-images", "0"], "--shard-images must be above 0"),
        (["data verify", "a", "--workers", "-1"], "--workers must not be negative, not -1"),
        (["data stats", "a", "--images", "0"], "--images must be above 0"),
        (["data in21k-p", "a", "b", "--val-images", "500"], "below --min-images"),
    ],
)
def test_bad_use_is_one_line(argv: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse(argv[0], argv[1:])


def test_a_mixture_is_refused(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(mixture)]) == 2
    assert "is a mixture; run the command on each of its sources instead" in capsys.readouterr().err


def test_shards_of_a_source_that_changed_are_not_continued(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    argv = ["data", "shard", str(data), str(tmp_path / "out"), "--workers", "0"]
    assert main(argv) == 0
    shutil.rmtree(data)
    shutil.copytree(pictures, data, copy_function=shutil.copyfile)  # with other times
    assert main(argv) == 0
    (data / "cat" / "00.jpg").write_bytes((data / "cat" / "01.jpg").read_bytes())
    (tmp_path / "out").rename(tmp_path / "out.partial")
    for folder in ("out.partial", "out"):
        (tmp_path / "out.partial").rename(tmp_path / folder)
        capsys.readouterr()
        assert main(argv) == 2
        assert "changed since they were begun: 1 of 23 files changed (cat/00.jpg: " in capsys.readouterr().err
