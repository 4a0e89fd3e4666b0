"""Rows of parquet files are images like any other; without pyarrow one line says what to install."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from localign.data.classification import labels_of
from localign.data.loader import TrainLoader
from localign.data.sources import ParquetSource, UnreadableImage, open_source, parquet
from localign.data.stream import sample_stream
from localign.data.transforms import TrainTransform
from localign.errors import UserError

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def test_rows_hold_the_images_of_the_folder_they_were_made_of(pictures: Path, rows: Path) -> None:
    folder, source = open_source(str(pictures)), open_source(str(rows))
    assert isinstance(source, ParquetSource)
    assert len(source) == len(folder)
    order = np.random.default_rng(0).permutation(len(source))
    for i in order.tolist():
        assert np.array_equal(np.asarray(source.load(i)), np.asarray(folder.load(i)))
    assert [source.name(i) for i in (0, 11, 12, 22)] == [
        "train-0.parquet:0",
        "train-0.parquet:11",
        "train-1.parquet:0",
        "train-1.parquet:10",
    ]
    again = pickle.loads(pickle.dumps(source))
    assert again.load(7).tobytes() == source.load(7).tobytes()
    assert again.fingerprint() == source.fingerprint()
    assert open_source(str(rows / "train-*.parquet")).fingerprint() == source.fingerprint()
    assert open_source(str(rows / "train-0.parquet")).fingerprint() != source.fingerprint()


def test_labels_are_read_with_their_names(rows: Path) -> None:
    labels = labels_of(open_source(str(rows)), "rows")
    assert labels.classes == ("cat", "dog")
    assert labels.codes.tolist() == [0] * 10 + [1] * 13  # type: ignore[attr-defined]


def test_images_come_by_row_groups_every_one_once(rows: Path) -> None:
    source = open_source(str(rows))
    assert isinstance(source, ParquetSource)
    source.window = 2
    stream = sample_stream(source, 3)
    group = np.repeat(np.arange(len(source.blocks)), source.blocks)
    orders = [stream.indices(e * 23, e * 23 + 23) for e in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(23))
        assert len(set(group[order[:3]])) <= 2  # of six: the window's, which hold three images or more
    assert orders[0].tolist() != orders[1].tolist()
    assert "row groups of up to 5 images" in source.notice


def test_a_window_needs_each_row_group_once(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(rows))
    read: list[tuple[int, int]] = []
    plain = pq.ParquetFile.read_row_group

    def counted(self: object, group: int, **options: object) -> object:
        read.append((id(self), group))
        return plain(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for index in sample_stream(source, 0).indices(0, 23):
        source.load(int(index))
    assert source.blocks is not None
    assert len(read) == len(source.blocks)


def test_rows_without_an_image_are_skipped_counted_and_named(tmp_path: Path, pictures: Path) -> None:
    data = [file.read_bytes() for file in sorted(pictures.rglob("*.jpg"))]
    data[3], data[4], data[5] = None, b"", data[5][:300]  # type: ignore[call-overload]
    images = [{"bytes": d, "path": None} for d in data]
    images[6] = None  # type: ignore[call-overload]
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"))
    loader = TrainLoader(
        source, TrainTransform(8), seed=0, global_batch=8, micro_batch=4, end_step=4, max_bad_share=0.2
    )
    assert sum(len(batch.images) for batch in loader) == 32
    assert set(loader.bad.reasons) == {f"x.parquet:{i}" for i in (3, 4, 5, 6)}
    assert "no image bytes" in loader.bad.reasons["x.parquet:3"]
    with pytest.raises(UserError, match="no labels"):
        labels_of(source, "x.parquet")


def test_a_damaged_page_costs_its_row_group_only(tmp_path: Path, rows: Path) -> None:
    data = bytearray((rows / "train-0.parquet").read_bytes())
    offset = pq.ParquetFile(rows / "train-0.parquet").metadata.row_group(1).column(0).data_page_offset
    data[offset : offset + 16] = b"\xff" * 16
    (tmp_path / "x.parquet").write_bytes(bytes(data))
    source = open_source(str(tmp_path / "x.parquet"))
    for i in range(len(source)):
        if 5 <= i < 10:
            with pytest.raises(UnreadableImage, match=f"x.parquet:{i}"):
                source.load(i)
        else:
            assert source.load(i).size == (40, 30)


def test_files_of_another_kind_are_refused_in_one_line(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"cannot read .*x\.parquet as parquet"):
        open_source(str(tmp_path / "x.parquet"))
    pq.write_table(pa.table({"text": ["a"], "number": [1]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match="no column 'image' with image bytes; its columns are text, number"):
        open_source(str(tmp_path / "y.parquet"))
    pq.write_table(pa.table({"jpg": [b"x"], "n": [1]}), tmp_path / "z.parquet")
    assert len(open_source(str(tmp_path / "z.parquet"))) == 1  # bytes of the only such column
    with pytest.raises(UserError, match="no such file"):
        open_source(str(tmp_path / "gone.parquet"))
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(UserError, match=r"a row group of .* write smaller row groups"):
        open_source(str(rows))


def test_without_pyarrow_one_line_says_what_to_install(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'localign\[parquet\]'"):
        open_source(str(rows))
