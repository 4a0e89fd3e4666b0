"""The mixtures have the records of the published mixtures, in the same order."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vlm_data import record, write_image, write_json

from localign.errors import UserError
from localign.vlm.data.mixtures import (
    PUBLISHED_RECORDS,
    lrv_records,
    merge_lrv_instruct,
    merge_lvis_instruct,
    prepare_ocr_vqa,
    strip_text_only,
)
from localign.vlm.data.records import Conversations


def read(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(path.read_text())
    return records


@pytest.fixture
def base(tmp_path: Path) -> Path:
    entries = [record(i, image=f"coco/{i}.png" if i % 2 else None) for i in range(9)]
    entries[3]["conversations"][1]["value"] = "é stays as it is written"
    path = tmp_path / "base.json"
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def lvis(tmp_path: Path) -> Path:
    for i in range(20, 25):
        write_image(tmp_path / "coco" / "val" / f"{i}.png")
    return write_json(tmp_path / "lvis.json", [record(i, image=f"coco/val/{i}.png") for i in range(20, 25)])


@pytest.fixture
def lrv(tmp_path: Path) -> Path:
    folder = tmp_path / "lrv-files"
    photos = [{"image_id": f"{i}", "question": f" q{i}\n", "answer": f"a{i} ", "task": "x"} for i in range(4)]
    write_json(folder / "filter_cap1.json", photos[:3])
    write_json(folder / "filter_cap_more1.json", [{**photos[3], "image_id": 3}])
    chart = {"image_id": "chart.7.png", "question": "how much?", "answer": "5"}
    (folder / "chart_release_update.json").write_text(json.dumps(chart) + "\n" + json.dumps(chart) + "\n")
    for i in range(4):
        write_image(tmp_path / "lrv" / "lrv-vg" / f"{i}.jpg")
    write_image(tmp_path / "lrv" / "lrv-chart" / "chart.7.png")
    return folder


def test_lvis_mixture_is_shuffled_as_published(tmp_path: Path, base: Path, lvis: Path) -> None:
    expected = read(base) + read(lvis)
    random.seed(7)
    for _ in range(3):
        random.shuffle(expected)
    written = merge_lvis_instruct(base, lvis, [tmp_path], tmp_path / "mixed.json")
    assert written == (tmp_path / "mixed.json", 14)
    assert read(written.file) == expected
    for i in range(9):  # the other images that the records name
        write_image(tmp_path / "coco" / f"{i}.png")
    assert len(Conversations.open([written.file])) == 14


def test_lrv_records(lrv: Path) -> None:
    records = lrv_records(lrv)
    assert [r["image"] for r in records] == [f"lrv/lrv-vg/{i}.jpg" for i in range(4)] + [
        "lrv/lrv-chart/chart.7.png"
    ] * 2
    assert records[3] == {
        "id": "3",
        "image": "lrv/lrv-vg/3.jpg",
        "conversations": [{"from": "human", "value": "<image>\nq3"}, {"from": "gpt", "value": "a3"}],
    }
    assert records[4]["id"] == "chart.7"


def test_lrv_mixtures_are_shuffled_by_one_generator(
    tmp_path: Path, base: Path, lvis: Path, lrv: Path
) -> None:
    """The published script writes both mixtures in one run; here each can be written alone."""
    with_lvis = merge_lvis_instruct(base, lvis, [tmp_path], tmp_path / "lvis4v.json").file
    added = lrv_records(lrv)
    first, second = read(base) + added, read(with_lvis) + added
    random.seed(7)
    for records in (first, second):
        for _ in range(3):
            random.shuffle(records)
    out = merge_lrv_instruct(with_lvis, lrv, [tmp_path], tmp_path / "both.json", before=base)
    assert read(out.file) == second
    assert out.records == len(second)
    assert read(merge_lrv_instruct(base, lrv, [tmp_path], tmp_path / "lrv.json").file) == first


def test_text_only_records_are_stripped(tmp_path: Path, base: Path) -> None:
    written = strip_text_only(base, tmp_path / "stripped.json")
    assert read(written.file) == [entry for entry in read(base) if "image" in entry]
    with pytest.raises(UserError, match=r"no record of .* has an image"):
        strip_text_only(write_json(tmp_path / "text.json", [record(0)]), tmp_path / "none.json")


def test_errors_leave_the_output_file_unchanged(tmp_path: Path, base: Path, lvis: Path, lrv: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text("as before")
    (tmp_path / "coco" / "val" / "21.png").unlink()
    with pytest.raises(
        UserError, match=r"1 images of .*lvis.json are missing; the first is coco/val/21.png of "
    ):
        merge_lvis_instruct(base, lvis, [tmp_path], out)
    (tmp_path / "lrv" / "lrv-vg" / "2.jpg").unlink()
    with pytest.raises(
        UserError, match=r"1 images of LRV-Instruct are missing; the first is lrv/lrv-vg/2.jpg"
    ):
        merge_lrv_instruct(base, lrv, [tmp_path], out)
    write_json(lrv / "filter_cap1.json", [{"image_id": "1", "question": "q"}])
    with pytest.raises(UserError, match=r"filter_cap1.json, record 1: 'answer' is missing or not a string"):
        merge_lrv_instruct(base, lrv, [tmp_path], out)
    assert out.read_text() == "as before"
    assert not list(tmp_path.glob(".*"))


def test_published_sizes_add_up() -> None:
    base, lvis, lrv, both, stripped = PUBLISHED_RECORDS.values()
    assert lvis - base == 222_711
    assert lrv - base == both - lvis == 342_799
    assert base - stripped == 40_688


def test_ocr_vqa_images_become_jpegs(tmp_path: Path) -> None:
    frames = [Image.new("P", (8, 8), colour) for colour in (0, 1)]
    for frame in frames:
        frame.putpalette([200, 10, 10, 10, 200, 10])
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    write_image(tmp_path / "b.PNG", 50)
    write_image(tmp_path / "c.png")
    write_image(tmp_path / "c.jpg", 77)
    (tmp_path / "d.gif").write_bytes(b"broken")
    before = (tmp_path / "c.jpg").read_bytes()
    done = prepare_ocr_vqa(tmp_path)
    assert (done.written, done.present, len(done.unreadable)) == (2, 1, 1)
    assert "d.gif" in done.unreadable[0].name
    red, green, _ = np.asarray(Image.open(tmp_path / "a.jpg"))[4, 4]
    assert red > 150 > 100 > green  # the first frame
    assert Image.open(tmp_path / "b.jpg").mode == "RGB"
    assert (tmp_path / "c.jpg").read_bytes() == before
    assert not (tmp_path / "d.jpg").exists()
    assert prepare_ocr_vqa(tmp_path).present == 3
    (tmp_path / "e.txt").touch()
    with pytest.raises(UserError, match=r"e.txt is not a GIF, PNG or JPEG file"):
        prepare_ocr_vqa(tmp_path)
