"""DINOv2 and SmolLM2 through training on real conversations, export, chat, and real questions of POPE."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path

import pytest

from localign.cli import main


def run(command: str) -> None:
    """Run a localign command, which must succeed."""
    assert main(shlex.split(command)) == 0


def stand_in_photographs(records: Path, photographs: Path, folder: Path) -> int:
    """Links to some photograph at the path of every image of the records. Returns the number of records."""
    content = json.loads(records.read_text())
    files = itertools.cycle(sorted(photographs.glob("*.jpg")))
    for path in dict.fromkeys(record["image"] for record in content if "image" in record):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(next(files))
    return len(content)


@pytest.fixture(scope="module")
def exported(models: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of real parts whose adapter has seen 24 real conversations, exported."""
    folder = tmp_path_factory.mktemp("vlm")
    records = data / "official" / "llava-mix" / "llava_v1_5_mix1k.json"
    assert stand_in_photographs(records, data / "coco-things" / "images" / "train", folder / "images") == 1000
    run(
        f"vlm train --llm {models / 'smollm2-135m'} --backbone {models / 'dinov2-small'} --image-size 112 "
        f"--prompt chat-template --stage align --lr 1e-3 --data {records} --images {folder / 'images'} --steps 6 "
        f"--batch-size 4 --max-length 384 --device cpu --log-every 1 --out {folder / 'run'}"
    )
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    print(f"losses of the 6 steps: {losses}")
    assert all(0 < loss < 8 for loss in losses), losses
    run(f"vlm export {folder / 'run'} --out {folder / 'export'}")
    return folder / "export"


def test_the_exported_model_answers_in_words(
    exported: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph = sorted((data / "coco-things" / "images" / "val").glob("*.jpg"))[0]
    capsys.readouterr()
    run(
        f"vlm chat {exported} {photograph} --question 'What is in this picture?' --max-new-tokens 24 --device cpu"
    )
    answer = capsys.readouterr().out.strip()
    print(f"answer: {answer}")
    assert len(answer.split()) >= 3, answer
    assert "<|im_" not in answer, "the marks of the chat template are no part of an answer"


def test_real_questions_of_pope_are_asked_and_scored(exported: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "pope" / "download").mkdir(parents=True)
    (tmp_path / "pope" / "download" / "pope").symlink_to(data / "official" / "pope")
    run(
        f"vlm eval {exported} --benchmarks pope --data {tmp_path / 'pope'} --allow-partial --limit 120 --device cpu "
        f"--out {tmp_path / 'eval'}"
    )
    answers = [json.loads(line) for line in (tmp_path / "eval" / "answers.jsonl").read_text().splitlines()]
    pope = json.loads((tmp_path / "eval" / "results.json").read_text())["benchmarks"]["pope"]
    assert 20 <= len(answers) == pope["questions"] <= 360
    assert len({answer["image"] for answer in answers}) > 10
    for answer in answers:
        chances = dict(zip(answer["choices"], answer["answer"], strict=True))
        assert 0 < sum(chances.values()) <= 1 + 1e-5
        assert answer["parsed"] == max(chances, key=chances.__getitem__)
    for split, count in pope["splits"].items():
        right = [a["parsed"] == a["truth"] for a in answers if a["split"] == split]
        assert len(right) == count
        figure = pope["figures"][f"accuracy__POPE-{split}-Accuracy"]["value"]
        assert figure == pytest.approx(100 * sum(right) / count)
    (note,) = pope["notes"]
    assert "because their image is missing" in note
