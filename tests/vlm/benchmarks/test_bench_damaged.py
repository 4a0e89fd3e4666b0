"""Malformed and damaged official files are refused in one line that names them, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from bench_files import (
    WRITERS,
    truncate,
    write_json,
    write_refcoco,
    write_tallyqa,
    write_textvqa,
    write_vsr,
)

from localign.data.sources import UnreadableImage, read_image
from localign.errors import UserError
from localign.vlm.benchmarks.refcoco import RefCOCO
from localign.vlm.benchmarks.table import benchmark


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (pickle.dumps([Evil()]), "it would run posix.mkdir"),
        (pickle.dumps([Path("x")]), "it would run pathlib"),
        (pickle.dumps([{"ref_id": 1}])[:-3], "is not a pickle of plain values"),
        (b"", "is not a pickle of plain values"),
        (b"\xff\xfe", "is not a pickle of plain values"),
        (pickle.dumps({"split": "val"}), "dict instead of a list of records"),
        (pickle.dumps([{"ref_id": 1}]), "reference 0: the field 'split' is missing"),
    ],
)
def test_pickles_are_not_executed(
    content: bytes, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_refcoco(tmp_path)
    (root / "download/refcoco/refcoco/refs(unc).p").write_bytes(content)
    with pytest.raises(UserError, match=line):
        benchmark("refcoco").read(root, allow_partial=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    path = write_refcoco(tmp_path) / "download/refcoco/refcoco/refs(unc).p"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert len(RefCOCO().read(tmp_path, allow_partial=True).questions) == 5


def test_a_truncated_image_has_a_size_and_an_empty_image_is_refused(tmp_path: Path) -> None:
    root = write_refcoco(tmp_path)
    expected = RefCOCO().read(root, allow_partial=True).questions
    image = root / "download/refcoco/train2014/COCO_train2014_000000000123.jpg"
    truncate(image)
    with pytest.raises(UnreadableImage):
        read_image(image, image.name)
    assert RefCOCO().read(root, allow_partial=True).questions == expected
    image.write_bytes(b"")
    with pytest.raises(UserError, match=r"the size of the image .*123\.jpg cannot be read"):
        RefCOCO().read(root, allow_partial=True)


@pytest.mark.parametrize("box", [[20, 10, 0, 40], [20, 10, 300, 40], [-20, 10, 80, 40], [20, 10, 80, -1]])
def test_boxes_outside_of_their_image_are_refused(box: list[float], tmp_path: Path) -> None:
    root = write_refcoco(tmp_path)
    path = root / "download/refcoco/refcoco/instances.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = box
    write_json(path, content)
    with pytest.raises(UserError, match=r"question RefCOCO-7-\d+: the box .* in an image of 200 x 100"):
        RefCOCO().read(root, allow_partial=True)


def changed(path: Path, **fields: object) -> None:
    """Change fields of the first record of a JSON list."""
    content = json.loads(path.read_text())
    write_json(path, [content[0] | fields, *content[1:]])


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"answer": 16}, r"record 0: the answer must be 0 to 15, not 16"),
        ({"answer": "3"}, r"record 0: the field 'answer' is '3', not int"),
        ({"question": None}, r"record 0: the field 'question' is None, not str"),
        ({"question_id": 2}, r"hold the question 2 more than once"),
    ],
)
def test_bad_records_are_named(fields: dict[str, object], line: str, tmp_path: Path) -> None:
    root = write_tallyqa(tmp_path)
    changed(root / "download/tally-qa/test.json", **fields)
    with pytest.raises(UserError, match=line) as refusal:
        benchmark("tallyqa").read(root, allow_partial=True)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "file", "content", "line"),
    [
        ("tallyqa", "tally-qa/test.json", "[{]", "is not valid JSON"),
        ("tallyqa", "tally-qa/test.json", "{}", "holds dict instead of a list of records"),
        ("tallyqa", "tally-qa/test.json", "[3]", "record 0 is int, not an object"),
        ("vsr", "vsr/test.jsonl", '{"a": 1}\n{', "line 2, is not valid JSON"),
        ("vsr", "vsr/test.jsonl", "\n", "no question of vsr has its image"),
        ("gqa", "gqa/testdev_balanced_questions.json", "[]", "is not an object from ids to questions"),
        ("vizwiz", "vizwiz/val.json", '[{"answers": []}]', "record 0: the field 'image' is missing"),
        ("ocid-ref", "ocid-ref/val_expressions.json", '{"1": {"bbox": "x"}}', "not a list in JSON"),
        ("ocid-ref", "ocid-ref/val_expressions.json", '{"1": {"bbox": "[1, 2]"}}', "not four numbers"),
        (
            "ocid-ref",
            "ocid-ref/val_expressions.json",
            '{"1": {"bbox": "[0, 0, 642, 480]"}}',
            "does not fit in an image of 640 x 480",
        ),
        (
            "ocid-ref",
            "ocid-ref/val_expressions.json",
            '{"1": {"bbox": "[0, 0, 9, 9]", "scene_path": "r", "sentence": "s", "take_id": 21}}',
            "the take must be 0 to 20, not 21",
        ),
        ("ai2d", "ai2d/ai2d_test_ids.csv", "id\n", "must hold image numbers"),
        ("ai2d", "ai2d/val_qa/questions/x.png.json", "{}", "not named by the number of its image"),
        (
            "pope",
            "pope/coco_pope_popular.json",
            '{"label": "maybe"}',
            "the label must be yes or no, not 'maybe'",
        ),
        ("textvqa", "text-vqa/textvqa_val_v051_ocr.jsonl", "{}", "holds 1 questions, but"),
        ("vqav2", "vqa-v2/v2_val2014_annotations.json", '{"annotations": [{}]}', "annotation 0: the field"),
        ("vqav2", "vqa-v2/v2_val2014_questions.json", "[]", "is list, not an object with fields"),
    ],
)
def test_bad_files_are_named(name: str, file: str, content: str, line: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path)
    (root / "download" / file).write_text(content)
    with pytest.raises(UserError, match=line) as refusal:
        benchmark(name).read(root, allow_partial=True)
    assert "\n" not in str(refusal.value)


def test_files_in_another_encoding_are_refused(tmp_path: Path) -> None:
    root = write_vsr(tmp_path)
    (root / "download/vsr/test.jsonl").write_bytes('{"caption": "café"}'.encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read"):
        benchmark("vsr").read(root)


def test_ocr_in_another_order_is_refused(tmp_path: Path) -> None:
    root = write_textvqa(tmp_path)
    path = root / "download/text-vqa/textvqa_val_v051_ocr.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[1], lines[0], lines[2]]) + "\n")
    with pytest.raises(UserError, match="2 of 3 questions are different"):
        benchmark("textvqa-ocr").read(root, allow_partial=True)


def test_textvqa_wants_ten_answers(tmp_path: Path) -> None:
    root = write_textvqa(tmp_path)
    path = root / "download/text-vqa/TextVQA_0.5.1_val.json"
    content = json.loads(path.read_text())
    content["data"][1]["answers"] = ["five"] * 9
    write_json(path, content)
    with pytest.raises(UserError, match="record 1: there are 9 answers, not 10"):
        benchmark("textvqa").read(root, allow_partial=True)
