"""The official question files of POPE and VSR: every question is read, asked and scored.

The published answers of LLaVA-1.5-13B give its published F1. They belong to another edition of POPE's files, so only
the questions of both editions are scored.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from bench_files import write_image
from bench_models import ALONE, ScriptedModel, save_tiny_vlm

from localign.cli import main
from localign.vlm.benchmarks.pope import POPE
from localign.vlm.benchmarks.vsr import VSR
from localign.vlm.evaluation.run import evaluate
from localign.vlm.scoring.messages import SHORT
from localign.vlm.scoring.questions import Question

OFFICIAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "official"
pytestmark = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="../shared/data/official is not there")

SPLITS = ("adversarial", "popular", "random")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def layout(root: Path, *, real_pope_images: bool = False) -> Path:
    """A data root with the official question files, and a picture for every VSR question."""
    pope, vsr = root / "download" / "pope", root / "download" / "vsr"
    for folder in (pope, vsr / "images"):
        folder.mkdir(parents=True)
    for split in SPLITS:
        shutil.copy(OFFICIAL / "pope" / f"coco_pope_{split}.json", pope)
    shutil.copy(OFFICIAL / "vsr" / "test.jsonl", vsr)
    if real_pope_images:
        (pope / "val_images").symlink_to(OFFICIAL / "pope" / "val_images")
    else:
        placeholders(pope / "val_images", {record["image"] for s in SPLITS for record in pope_records(s)})
    placeholders(vsr / "images", {record["image"] for record in lines(vsr / "test.jsonl")})
    return root


def pope_records(split: str) -> list[dict[str, Any]]:
    return lines(OFFICIAL / "pope" / f"coco_pope_{split}.json")


def placeholders(folder: Path, names: set[str]) -> None:
    """One small picture under many names."""
    first, *others = sorted(names)
    write_image(folder / first, (24, 16))
    for name in others:
        (folder / name).hardlink_to(folder / first)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layout(tmp_path_factory.mktemp("complete"))


def test_the_official_files_of_pope_are_complete(complete: Path) -> None:
    data = POPE().read(complete)
    assert (len(data.questions), data.deviations) == (9000, ())
    assert len({question.image for question in data.questions}) == 500
    asked = {question.id: question for question in data.questions}
    for split in SPLITS:
        for record in pope_records(split):
            question = asked[f"{split}-{record['question_id']}"]
            assert question.message == f"{record['text']}\n{SHORT}"
            assert Path(question.image).name == record["image"]
            assert question.payload["label"] == ("yes", "no").index(record["label"])


def test_the_official_files_of_vsr_are_complete(complete: Path) -> None:
    data = VSR().read(complete)
    assert (len(data.questions), data.deviations) == (1222, ())
    records = lines(OFFICIAL / "vsr" / "test.jsonl")
    for question in data.questions:
        record = records[int(question.id)]
        assert record["caption"] in question.message
        assert question.payload == {"label": 1 - record["label"], "relation": record["relation"]}


def test_the_edition_is_the_digest_of_the_files(complete: Path) -> None:
    files = [(OFFICIAL / "pope" / f"coco_pope_{split}.json").read_bytes() for split in SPLITS]
    expected = hashlib.sha256(b"".join(files)).hexdigest()[:16]
    assert POPE().read(complete).edition == expected
    assert POPE().read(complete, limit=5).edition == expected
    vsr = hashlib.sha256((OFFICIAL / "vsr" / "test.jsonl").read_bytes()).hexdigest()[:16]
    assert VSR().read(complete).edition == vsr != expected


@pytest.mark.slow
def test_eval_asks_the_official_questions(tmp_path: Path) -> None:
    """56 of POPE's 500 pictures are there, with 1,008 questions."""
    root = layout(tmp_path / "data", real_pope_images=True)
    model = save_tiny_vlm(tmp_path / "model", words=("Yes", "No", "True", "False"))
    command = (
        f"vlm eval {model} --benchmarks pope,vsr --data {root} --allow-partial --device cpu --batch-size 64 "
        f"--out {tmp_path / 'out'}"
    )
    assert main(shlex.split(command)) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]
    assert found["pope"]["questions"] == 1008
    assert "7992 of 9000 questions are left out" in found["pope"]["notes"][0]
    assert (found["vsr"]["questions"], found["vsr"]["notes"]) == (1222, [])
    assert all(len(found[name]["edition"]) == 16 for name in ("pope", "vsr"))
    assert len(lines(tmp_path / "out" / "answers.jsonl")) == 1008 + 1222


@dataclass
class PublishedModel(ScriptedModel):
    """Gives the published answers: all probability is on the word that was answered."""

    answers: dict[tuple[str, str, str], str] | None = None

    def choice_probabilities(self, questions: Sequence[Question]) -> list[list[float]]:
        said = [(self.answers or {})[key_of(question)] for question in questions]
        return [[float(choice == word) for choice in ("Yes", "No")] for word in said]


def key_of(question: Question) -> tuple[str, str, str]:
    return question.split, Path(question.image).name, question.message


@pytest.mark.slow
def test_published_answers_give_the_published_f1(
    complete: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = lines(OFFICIAL / "llava-eval" / "pope" / "llava_pope_test.jsonl")
    said = lines(OFFICIAL / "llava-eval" / "pope" / "answers" / "llava-v1.5-13b.jsonl")
    assert len(asked) == len(said) == 8910
    answers = {(a["category"], a["image"], a["text"]): b["text"] for a, b in zip(asked, said, strict=True)}
    assert set(answers.values()) == {"Yes", "No"}
    data = POPE().read(complete)
    shared = [question for question in data.questions if key_of(question) in answers]
    assert len(shared) == 8664
    suites = [(POPE(), replace(data, questions=shared))]
    evaluate(PublishedModel(answers=answers), suites, tmp_path / "llava", ALONE, 1024, "LLaVA-1.5-13B")
    before = (tmp_path / "llava" / "results.json").read_text()
    assert main(["vlm", "score", str(tmp_path / "llava")]) == 0
    pope = json.loads((tmp_path / "llava" / "results.json").read_text())["benchmarks"]["pope"]
    f1 = {split: round(pope["figures"][f"POPE-{split}-F1"]["value"], 1) for split in SPLITS}
    assert f1 == {"adversarial": 84.5, "popular": 86.3, "random": 87.3}
    assert pope == json.loads(before)["benchmarks"]["pope"]
    assert f"edition    pope: {data.edition}" in capsys.readouterr().out
