"""Question files of benchmarks as people store them: what is read alike, and what is refused instead of misread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_files import WRITERS, write_image, write_pope, write_vsr

from localign.cli import main
from localign.errors import UserError
from localign.vlm.benchmarks.table import BENCHMARKS, benchmark
from localign.vlm.scoring.questions import Question

OFFICIAL = [name for name in BENCHMARKS if name != "scenes"]


def read(name: str, root: Path, **options: bool) -> list[Question]:
    return benchmark(name).read(root, allow_partial=True, **options).questions


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_byte_order_mark_changes_nothing(name: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path)
    expected = read(name, root)
    for path in root.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".csv"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(name, root) == expected


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_edition_follows_every_question_file(name: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path)
    suite = benchmark(name)
    first = suite.read(root, allow_partial=True).edition
    files = list(suite.files(root))
    assert len(first) == 16
    assert files
    for path in files:
        if path.suffix in (".json", ".jsonl", ".csv"):
            path.write_bytes(path.read_bytes() + b"\n")
            changed = suite.read(root, allow_partial=True).edition
            assert changed != first
            first = changed


@pytest.mark.parametrize(
    ("name", "file"), [("pope", "pope/coco_pope_random.json"), ("vsr", "vsr/test.jsonl")]
)
def test_lists_and_lines_are_read_alike(name: str, file: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path)
    expected = read(name, root)
    path = root / "download" / file
    path.write_text(json.dumps([json.loads(line) for line in path.read_text().splitlines()], indent=1))
    assert read(name, root) == expected


def test_labels_of_pope_are_read_in_any_case(tmp_path: Path) -> None:
    root = write_pope(tmp_path)
    expected = read("pope", root)
    path = root / "download/pope/coco_pope_random.json"
    path.write_text(path.read_text().replace('"yes"', '"Yes"').replace('"no"', '"NO "'))
    assert read("pope", root) == expected


def spoil(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, text[:300]
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "says"),
    [
        ("vsr", "vsr/test.jsonl", '"label": 1', '"label": 2', "the field 'label' must be 0 or 1, not 2"),
        ("vsr", "vsr/test.jsonl", '"label": 0', '"label": -1', "the field 'label' must be 0 or 1, not -1"),
        ("vizwiz", "vizwiz/val.json", '"answerable": 1', '"answerable": 3', "'answerable' must be 0 or 1"),
        ("vqav2", "vqa-v2/v2_val2014_questions.json", '"question_id"', '"id"', "'question_id' is missing"),
        ("ocid-ref", "ocid-ref/val_expressions.json", '"bbox": "[', '"bbox": "[NaN, ', "not four numbers"),
    ],
)
def test_values_without_a_meaning_are_refused(
    name: str, file: str, old: str, new: str, says: str, tmp_path: Path
) -> None:
    root = WRITERS[name](tmp_path)
    spoil(root / "download" / file, old, new)
    with pytest.raises(UserError, match=says) as refusal:
        read(name, root)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "true", "1e999", "1" + "0" * 400])
def test_boxes_are_finite(number: str, tmp_path: Path) -> None:
    root = WRITERS["refcoco"](tmp_path)
    path = root / "download/refcoco/refcoco/instances.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = ["HERE", 1, 2, 3]
    path.write_text(json.dumps(content).replace('"HERE"', number))
    with pytest.raises(UserError, match=r"annotation 0: the field 'bbox' is .*, not four numbers"):
        read("refcoco", root)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "[" * 50_000 + "]" * 50_000, "\0" * 100_000]
)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_deep_files_are_one_line(name: str, content: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path)
    for path in benchmark(name).files(root):
        path.write_text(content)
    with pytest.raises(UserError) as refusal:
        read(name, root)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


# -- image paths ---------------------------------------------------------------------------------------------


def with_image(root: Path, image: str) -> None:
    """Name an image in the first question of VSR."""
    path = root / "download/vsr/test.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"image": image}), *others]))


@pytest.mark.parametrize("image", ["@/secret.png", "../../../../secret.png", "x/../../../../../secret.png"])
def test_images_outside_the_data_root_need_an_option(
    image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_vsr(tmp_path / "data")
    write_image(tmp_path / "secret.png")
    with_image(root, image.replace("@", str(tmp_path)))
    with pytest.raises(UserError, match=r"secret.png, which is outside the data root .*--allow-outside"):
        read("vsr", root)
    if "x/" not in image:
        assert any(Path(q.image).name == "secret.png" for q in read("vsr", root, allow_outside=True))
    command = ["vlm", "eval", "no-model", "--benchmarks", "vsr", "--data", str(root), "--allow-partial"]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "outside the data root" in capsys.readouterr().err


def test_links_and_absolute_paths_inside_the_data_root_are_read(tmp_path: Path) -> None:
    root = write_vsr(tmp_path / "data")
    images = root / "download/vsr/images"
    images.rename(tmp_path / "store")
    images.symlink_to(tmp_path / "store")
    expected = read("vsr", root)
    (tmp_path / "alias").symlink_to(root)
    assert len(read("vsr", tmp_path / "alias")) == len(expected)
    with_image(root, expected[0].image)
    assert len(read("vsr", root)) == len(expected)
    assert len(read("vsr", tmp_path / "alias")) == len(expected)
