"""Tar and parquet files that are something else, damaged or hostile: one line that says what they are."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localign.data.classification import ClassLabels, labels_of
from localign.data.sources import TarSource, open_source, parquet
from localign.data.sources.layouts.parquet_pages import page_sizes
from localign.errors import RunFailure, UserError

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def png(side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def tar_bytes() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
    return file.getvalue()


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [png()]}), file)
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (gzip.compress(tar_bytes()), "compressed with gzip; decompress it with gunzip"),
        (b"BZh91AY&SY", "compressed with bzip2"),
        (b"\xfd7zXZ\0\0", "compressed with xz"),
        (b"\x28\xb5\x2f\xfd\x04", "compressed with zstd"),
        (LFS, "a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (b"PK\x03\x04\x14", "a zip archive"),
        (b"<!DOCTYPE html><html>404", "a web page"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b"", "it is empty"),
    ],
)
def test_files_of_another_kind_are_called_what_they_are(
    tmp_path: Path, suffix: str, content: bytes, line: str
) -> None:
    (tmp_path / f"x.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=line) as caught:
        open_source(str(tmp_path / f"x.{suffix}"))
    assert f"x.{suffix}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tar_and_parquet_files_under_the_name_of_the_other(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(parquet_bytes())
    with pytest.raises(UserError, match=r"x\.tar is not a readable tar file: it is a parquet file"):
        open_source(str(tmp_path / "x.tar"))
    (tmp_path / "y.parquet").write_bytes(tar_bytes())
    with pytest.raises(UserError, match=r"cannot read .*y\.parquet as parquet: it is a tar file"):
        open_source(str(tmp_path / "y.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "x.tar.gz",
            gzip.compress(tar_bytes()),
            "a file, not a folder of images: it is compressed with gzip",
        ),
        ("x.zip", b"PK\x03\x04", "it is a zip archive"),
        ("x.jpg", b"\xff\xd8\xff", "it is a JPEG image"),
        ("x.bin", b"abc", "a file, not a folder of images$"),
    ],
)
def test_other_files_are_no_source(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_special_files_are_refused_and_not_waited_for(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"x.{suffix}")
    with pytest.raises(UserError, match="a folder or a special file"):
        open_source(str(tmp_path / f"x.{suffix}"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a link"),
        (tarfile.FIFOTYPE, "a special file"),
        (tarfile.CHRTYPE, "a special file"),
    ],
)
def test_members_that_are_no_files_are_named(tmp_path: Path, kind: bytes, words: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
        other = tarfile.TarInfo("b.png")
        other.type, other.linkname = kind, "a.png"
        tar.addfile(other)
    source = open_source(str(tmp_path / "x.tar"))
    assert isinstance(source, TarSource)
    assert source.unreadable == (("b.png", f"{words} in x.tar, not a file"),)


def test_a_sparse_member_is_named(tmp_path: Path) -> None:
    if os.system("command -v tar > /dev/null") != 0:
        pytest.skip("GNU tar is not here")
    with open(tmp_path / "b.png", "wb") as file:
        file.truncate(2**20)
        file.seek(2**19)
        file.write(png())
    (tmp_path / "a.png").write_bytes(png())
    subprocess.run(
        ["tar", "--sparse", "-cf", "x.tar", "a.png", "b.png"], cwd=tmp_path, check=True, timeout=30
    )
    source = open_source(str(tmp_path / "x.tar"))
    assert source.unreadable == (("b.png", "a sparse file in x.tar, not a file"),)
    assert len(source) == 1


@pytest.mark.parametrize(
    ("column", "line"),
    [
        ([[1], [2]], "of type list"),
        ([{"id": 1}, {"id": 2}], "of type struct"),
        ([1.0, float("nan")], "row 1 has no label"),
        ([None, 1], "row 0 has no label"),
        ([None, None], "row 0 has no label"),
        (["cat", ""], "row 1 has no label"),
        (["cat", "cat"], "has a single class"),
    ],
)
def test_labels_of_rows_that_are_no_classes(tmp_path: Path, column: list[object], line: str) -> None:
    """They are an error of commands that need labels, and of no other."""
    pq.write_table(pa.table({"image": [png(), png()], "label": column}), tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"))
    assert source.load(1).size == (4, 4)
    with pytest.raises(UserError, match=line):
        labels_of(source, "x.parquet")


@pytest.mark.parametrize(
    ("column", "classes"),
    [
        (["dog", "cat"], ("cat", "dog")),
        ([10, 9], ("9", "10")),
        ([True, False], ("False", "True")),
        ([1.5, 0.5], ("0.5", "1.5")),
        ([b"dog", b"cat"], ("cat", "dog")),
        (pa.array(["dog", "cat"]).dictionary_encode(), ("cat", "dog")),
    ],
)
def test_labels_of_every_plain_type_are_classes(
    tmp_path: Path, column: object, classes: tuple[str, ...]
) -> None:
    pq.write_table(pa.table({"image": [png(), png()], "label": column}), tmp_path / "x.parquet")
    labels = labels_of(open_source(str(tmp_path / "x.parquet")), "x.parquet")
    assert isinstance(labels, ClassLabels)
    assert labels.classes == classes
    assert labels.codes.tolist() == [1, 0]


def test_the_field_of_a_parquet_file_is_a_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"Left": [png(4)], "right": [png(8)], "n": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="--field chooses a column"):
        open_source(str(tmp_path / "x.parquet"))
    assert open_source(str(tmp_path / "x.parquet"), field="right").load(0).size == (8, 8)
    assert open_source(str(tmp_path / "x.parquet"), field="middle,left").load(0).size == (4, 4)
    with pytest.raises(UserError, match="has no column n with image bytes"):
        open_source(str(tmp_path / "x.parquet"), field="n")


# -- memory -----------------------------------------------------------------------------------------------


def write_bomb(path: Path, rows: int, size: int, nested: bool = False) -> Path:
    """Rows that all hold the same image of ``size`` bytes: a file of a few KB."""
    image = png() + bytes(size)
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([image]))
    table = pa.table({"image": pa.StructArray.from_arrays([values], ["bytes"]) if nested else values})
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False)
    return path


def test_the_pages_of_a_column_are_added_up(tmp_path: Path) -> None:
    file = write_bomb(tmp_path / "x.parquet", 100, 2**16)
    chunk = pq.ParquetFile(file).metadata.row_group(0).column(0)
    data = file.read_bytes()
    found = page_sizes(
        lambda at, size: data[at : at + size], chunk.dictionary_page_offset, chunk.total_compressed_size
    )
    assert found.dictionary == 4 + len(png()) + 2**16
    assert found.values == 100
    assert found.expanded > 100 * 2**16 > found.stored


@pytest.mark.parametrize("nested", [False, True])
def test_repeated_images_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 2**20)
    source = open_source(str(write_bomb(tmp_path / "x.parquet", 1000, 2**14, nested)))
    before = pa.total_allocated_bytes()
    assert [source.load(i).size for i in (0, 999)] == [(4, 4)] * 2
    assert pa.total_allocated_bytes() - before < 2**22


@pytest.mark.slow
def test_a_small_file_of_gigabytes_does_not_take_them(tmp_path: Path) -> None:
    file = write_bomb(tmp_path / "x.parquet", 100_000, 2**15)  # 3 GiB
    assert file.stat().st_size < 10_000
    code = f"""
        import resource
        from localign.data.sources import open_source
        source = open_source({str(file)!r})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert source.load(99_999).size == (4, 4)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_a_page_that_is_larger_than_the_metadata_say_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(
        pa.table({"image": [png() + bytes(2**18)] * 4}), tmp_path / "x.parquet", compression="zstd",
        use_dictionary=False,
    )  # fmt: skip
    source = open_source(str(tmp_path / "x.parquet"))
    source._cache.max_bytes = 2**19  # type: ignore[attr-defined]
    with pytest.raises(
        RunFailure, match=r"row group 0 of .* takes 0\.0 GiB; .* or raise --max-row-group-gib"
    ):
        source.load(0)
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 2**19)
    with pytest.raises(UserError, match="or raise --max-row-group-gib"):
        open_source(str(tmp_path / "x.parquet"))
    assert open_source(str(tmp_path / "x.parquet"), max_group_bytes=2**22).load(3).size == (4, 4)


@pytest.mark.parametrize(
    "damage", [b"", b"\x00", b"\xff" * 20, b"\x15\x00\x15", b"\x1c" * 40, b"\x18\xff\xff\xff\xff\x0f"]
)
def test_damaged_page_headers_are_value_errors(damage: bytes) -> None:
    with pytest.raises(ValueError, match="page header"):
        page_sizes(lambda at, size: damage[at : at + size], 0, 100)


def test_more_rows_than_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_MIN_ROWS", 1000)
    with pytest.raises(UserError, match=r"damaged: it claims 50,000 images in"):
        open_source(str(write_bomb(tmp_path / "x.parquet", 50_000, 10)))


def test_images_of_many_kinds_of_pages_are_the_same(tmp_path: Path) -> None:
    """Reading through a dictionary gives the same bytes, also where pages without a dictionary follow."""
    values = [png() + bytes([i % 7]) * (i % 5 * 1000) for i in range(200)]
    pq.write_table(pa.table({"image": values}), tmp_path / "x.parquet", dictionary_pagesize_limit=2000)
    source = open_source(str(tmp_path / "x.parquet"))
    plain = [source.encoded(i) for i in range(200)]  # type: ignore[attr-defined]
    assert plain == values
    again = open_source(str(tmp_path / "x.parquet"), max_group_bytes=2**20)
    assert [again.encoded(i) for i in range(200)] == values  # type: ignore[attr-defined]
