"""Metrics of the benchmarks of boxes, worked out by hand from scripted answers to miniatures."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_files import by_id, scored, words, write_ocid_ref, write_refcoco

from localign.errors import UserError
from localign.vlm.benchmarks.table import benchmark
from localign.vlm.scoring.boxes import BoxFrame

REFCOCO = {
    "RefCOCO-7-9": "[0.1, 0.1, 0.5, 0.5]",  # the box: 1
    "RefCOCO-7-10": "[0.1, 0.1, 0.2, 0.5]",  # a quarter of it: 0.25
    "RefCOCO-8-11": "over there",
    "RefCOCO+-7-9": "[0.016, 0.031, 0.019, 0.036]",  # the box: 1
    "RefCOCOg-3-5": "At [0.25, 0.25, 0.75, 0.75].",  # the box: 1
}


def test_refcoco_as_declared(tmp_path: Path) -> None:
    suite = benchmark("refcoco")
    data = suite.read(write_refcoco(tmp_path), allow_partial=True)
    samples = scored(suite, data, words(REFCOCO))
    assert suite.aggregate(samples) == pytest.approx(
        {
            "accuracy__RefCOCO": 100 / 3,
            "accuracy__RefCOCO+": 100,
            "accuracy__RefCOCOg": 100,
            "invalid__RefCOCO": 100 / 3,
            "invalid__RefCOCO+": 0,
            "invalid__RefCOCOg": 0,
            "iou__RefCOCO": 125 / 3,
            "iou__RefCOCO+": 100,
            "iou__RefCOCOg": 100,
        }
    )
    found = by_id(samples)
    assert found["RefCOCO-8-11"]["fault"] == "no box"
    assert found["RefCOCO-8-11"]["truth"] == [0.6, 0.6, 1, 1]  # cut at the border
    assert found["RefCOCO-7-10"]["iou"] == pytest.approx(0.25)
    assert found["RefCOCOg-3-5"]["parsed"] == [0.25, 0.25, 0.75, 0.75]


def test_refcoco_as_published(tmp_path: Path) -> None:
    suite = benchmark("refcoco", "published")
    data = suite.read(write_refcoco(tmp_path), allow_partial=True)
    samples = scored(suite, data, words(REFCOCO))
    figures = suite.aggregate(samples)
    assert figures["accuracy__RefCOCO"] == pytest.approx(100 / 3)
    # 3.2 / 200 and 3.8 / 200 both round to 0.02: the true box has no width, so nothing is ever right
    assert figures["accuracy__RefCOCO+"] == 0
    assert figures["invalid__RefCOCO+"] == 0
    assert figures["accuracy__RefCOCOg"] == 0  # because of the words around the box
    assert figures["invalid__RefCOCOg"] == 100
    with pytest.raises(UserError, match="padded-square:0-1; use --scoring default"):
        scored(suite, data, words(REFCOCO, BoxFrame("padded-square")))


def test_refcoco_answered_in_padded_squares(tmp_path: Path) -> None:
    # 200 x 100 gets 50 rows above, 60 x 120 gets 30 columns on the left; the scale is 1000
    squares = {
        "RefCOCO-7-9": "[100, 300, 500, 500]",
        "RefCOCO-7-10": "[100, 300, 500, 500]",
        "RefCOCO-8-11": "[600, 550, 1000, 900]",  # the part below y = 750 is padding and does not count
        "RefCOCO+-7-9": "[16, 265.5, 19, 268]",
        "RefCOCOg-3-5": "[375, 250, 625, 750]",
    }
    frame = BoxFrame("padded-square", 1000)
    suite = benchmark("refcoco")
    data = suite.read(write_refcoco(tmp_path), allow_partial=True)
    samples = scored(suite, data, words(squares, frame))
    assert [sample["iou"] for sample in samples] == pytest.approx([1.0] * 5, abs=1e-6)
    assert {sample["frame"] for sample in samples} == {"padded-square:0-1000"}


def test_answers_in_another_frame_than_asked_for_are_refused(tmp_path: Path) -> None:
    square = BoxFrame("padded-square")
    data = benchmark("refcoco").read(write_refcoco(tmp_path), allow_partial=True)
    problem = "in the box frame padded-square:0-1, but only answers in letterboxed:336x336:0-1 are scored"
    with pytest.raises(UserError, match=problem):
        scored(
            benchmark("refcoco", frame=BoxFrame.parse("letterboxed:336x336:0-1")),
            data,
            words(REFCOCO, square),
        )
    with pytest.raises(UserError, match="does not declare the frame of its boxes"):
        scored(benchmark("refcoco"), data, words(REFCOCO, None))
    assert len(scored(benchmark("refcoco", frame=square), data, words(REFCOCO, square))) == 5


def test_ocid_ref(tmp_path: Path) -> None:
    suite = benchmark("ocid-ref")
    data = suite.read(write_ocid_ref(tmp_path), allow_partial=True)
    answers = {
        "12": "[0.1, 0.1, 0.2, 0.2]",  # the box: 1
        "13": "[0.1, 0.1, 0.2, 0.13]",  # 0.3, right from 0.25 on
        "14": "[0.1, 0.1, 0.1, 0.2]",  # no width
        "15": "[0.1, 0.1, 0.2, 0.12]",  # 0.2
        "16": "[0, 0, 1, 1]",  # the whole image: 1
        "17": "",
    }
    figures = suite.aggregate(scored(suite, data, words(answers)))
    expected = {"Minimum": 100, "Medium": 0, "Maximum": 50, "All": 50}
    assert {part: figures[f"accuracy__OCIDRef-{part}"] for part in expected} == pytest.approx(expected)
    assert figures["invalid__OCIDRef-Medium"] == 50
    assert figures["invalid__OCIDRef-All"] == pytest.approx(100 / 3)
    assert figures["iou__OCIDRef-All"] == pytest.approx(100 * (1 + 0.3 + 0 + 0.2 + 1 + 0) / 6)
