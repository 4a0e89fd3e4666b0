"""An evaluation: which questions it asks, which answers it reuses, what it writes, and how it continues."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_files import truncate, write_image
from bench_models import ALONE, CPU, Killed, ScriptedModel, suites

from localign.engine.distributed import DistributedContext
from localign.errors import UserError
from localign.vlm.benchmarks.table import BENCHMARKS
from localign.vlm.benchmarks.vsr import VSR
from localign.vlm.data.images import open_image
from localign.vlm.evaluation import run
from localign.vlm.evaluation.results import write_answers
from localign.vlm.evaluation.run import Suites, evaluate
from localign.vlm.scoring.boxes import BoxFrame
from localign.vlm.scoring.questions import Question

NAMES = ("pope", "refcoco", "gqa", "tallyqa", "vqav2")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Suites:
    return suites(tmp_path_factory.mktemp("data"), *NAMES)


@pytest.fixture(scope="module")
def whole(asked: Suites, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    evaluate(ScriptedModel(), asked, folder, ALONE, 3)
    return folder


def ids(asked: Suites) -> list[str]:
    return [question.id for _, data in asked for question in data.questions]


def assert_same(folder: Path, expected: Path) -> None:
    for name in ("results.json", "answers.jsonl"):
        assert (folder / name).read_text() == (expected / name).read_text()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_every_question_is_asked_once_and_logged(asked: Suites, tmp_path: Path) -> None:
    model = ScriptedModel()
    results = evaluate(model, asked, tmp_path, ALONE, 2, "name")
    assert sorted(model.asked) == sorted(ids(asked))
    records = lines(tmp_path)
    assert [(r["benchmark"], r["id"]) for r in records] == [
        (suite.name, question.id) for suite, data in asked for question in data.questions
    ]
    for record in records:
        assert record["prompt"] == f"Q: {record['message']} A:"
        assert {"answer", "parsed", "truth", "score"} <= record.keys()
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results is not None
    assert results["model"] == {"name": "name", "weights": "one", "boxes": "original:0-1"}


def test_results_describe_questions_and_scoring(asked: Suites, tmp_path: Path) -> None:
    model = ScriptedModel()
    model._words = lambda question: "" if question.id == "RefCOCO-7-9" else "[0, 0, 1, 1]"  # type: ignore[method-assign]
    results = evaluate(model, asked, tmp_path, ALONE, 8)
    assert results is not None
    pope, refcoco = (results["benchmarks"][name] for name in ("pope", "refcoco"))
    assert pope["questions"] == 6
    assert pope["splits"] == {"adversarial": 2, "popular": 2, "random": 2}
    assert (pope["version"], pope["scoring"], pope["limit"]) == (1, "published", None)
    assert pope["notes"][0].startswith("2 questions in 'adversarial' instead of 3000")
    assert pope["invalid"] == 0
    assert (refcoco["scoring"], refcoco["invalid"]) == ("declared", 1)
    figure = refcoco["figures"]["invalid__RefCOCO"]
    assert figure["value"] == pytest.approx(100 / 3)
    assert figure["value"] is not None
    assert figure["interval"] is not None
    low, high = figure["interval"]
    assert 0 <= low <= figure["value"] <= high <= 100
    assert set(pope["headline"]) <= pope["figures"].keys()


def test_an_unchanged_run_asks_nothing(asked: Suites, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    evaluate(ScriptedModel(patience=0), asked, tmp_path, ALONE, 3)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("batches", range(7))
def test_an_interrupted_run_continues(asked: Suites, whole: Path, tmp_path: Path, batches: int) -> None:
    first, second = ScriptedModel(patience=batches), ScriptedModel()
    with pytest.raises(Killed):
        evaluate(first, asked, tmp_path, ALONE, 3)
    assert not (tmp_path / "results.json").exists()
    evaluate(second, asked, tmp_path, ALONE, 5)
    assert sorted(first.asked + second.asked) == sorted(ids(asked))
    assert_same(tmp_path, whole)


def test_an_interruption_while_writing_leaves_no_old_results(
    asked: Suites, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(ScriptedModel(weights="two"), asked, tmp_path, ALONE, 3)

    def killed(*arguments: Any) -> None:
        write_answers(*arguments)
        raise Killed

    monkeypatch.setattr("localign.vlm.evaluation.run.write_answers", killed)
    with pytest.raises(Killed):
        evaluate(ScriptedModel(), asked, tmp_path, ALONE, 3)
    monkeypatch.setattr("localign.vlm.evaluation.run.write_answers", write_answers)
    assert not (tmp_path / "results.json").exists()
    evaluate(ScriptedModel(patience=0), asked, tmp_path, ALONE, 3)
    assert_same(tmp_path, whole)


class ImageOpeningModel(ScriptedModel):
    """Opens the images of its questions, as real models do."""

    def _record(self, questions: Sequence[Question]) -> Sequence[Question]:
        for question in questions:
            open_image(question.image)
        return super()._record(questions)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_questions_on_a_truncated_image_are_counted_and_named(name: str, tmp_path: Path) -> None:
    [(suite, data)] = suites(tmp_path / "data", name)
    broken = Path(data.questions[0].image)
    content = broken.read_bytes()
    truncate(broken)
    lost = [question.id for question in data.questions if question.image == str(broken)]
    kept = [question for question in data.questions if question.id not in lost]
    model = ImageOpeningModel()
    if not kept:
        with pytest.raises(
            UserError, match=f"no question of {name} has an image that can be read.*{broken.name}"
        ):
            evaluate(model, [(suite, data)], tmp_path / "out", ALONE, 3)
        return
    results = evaluate(model, [(suite, data)], tmp_path / "out", ALONE, 3)
    assert results is not None
    outcome = results["benchmarks"][name]
    assert outcome["questions"] == len(kept)
    assert outcome["notes"][-1] == (
        f"{len(lost)} of {len(data.questions)} questions are left out because their image cannot be read, for example "
        f"{broken}"
    )
    rest = evaluate(ScriptedModel(), [(suite, replace(data, questions=kept))], tmp_path / "rest", ALONE, 3)
    assert rest is not None
    assert outcome["figures"] == rest["benchmarks"][name]["figures"]

    broken.write_bytes(content)  # once the image is repaired, only the questions that were left out are asked
    again = ImageOpeningModel()
    results = evaluate(again, [(suite, data)], tmp_path / "out", ALONE, 3)
    assert sorted(again.asked) == sorted(lost)
    assert results is not None
    assert results["benchmarks"][name]["questions"] == len(data.questions)


def test_a_truncated_image_is_refused_after_all_other_questions_if_data_must_be_complete(
    tmp_path: Path,
) -> None:
    [(suite, data)] = suites(tmp_path / "data", "vsr")
    truncate(Path(data.questions[1].image))
    model, out = ImageOpeningModel(), tmp_path / "out"
    with pytest.raises(
        UserError, match=r"vsr are not complete: 1 of 4 questions are left out .*--allow-partial"
    ):
        evaluate(model, [(suite, replace(data, allow_partial=False))], out, ALONE, 2)
    assert len(model.asked) == 3
    assert not (out / "results.json").exists()
    evaluate(ImageOpeningModel(), [(suite, data)], out, ALONE, 2)
    assert len(lines(out)) == 3


def test_questions_with_incomplete_cached_answers_are_asked_again(
    asked: Suites, whole: Path, tmp_path: Path
) -> None:
    content = (whole / "responses/rank0.jsonl").read_bytes()
    file = tmp_path / "responses/rank0.jsonl"
    file.parent.mkdir()
    for end in range(0, len(content), 211):
        file.write_bytes(content[:end])
        model = ScriptedModel()
        evaluate(model, asked[:1], tmp_path, ALONE, 4)
        assert len(model.asked) == max(0, 6 - content[:end].count(b"\n"))
        assert sorted(file.read_bytes().splitlines()[:6]) == sorted(content.splitlines()[:6])


@pytest.mark.parametrize(("weights", "words"), [("two", "Q: {} A:"), ("one", "In: {}\nOut:")])
def test_another_model_or_prompt_uses_no_cached_answer(
    asked: Suites, whole: Path, tmp_path: Path, weights: str, words: str
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    model = ScriptedModel(weights, words)
    evaluate(model, asked, tmp_path, ALONE, 3)
    assert sorted(model.asked) == sorted(ids(asked))
    evaluate(ScriptedModel(patience=0), asked, tmp_path, ALONE, 3)  # the old model's answers are still there
    assert_same(tmp_path, whole)


def test_a_changed_question_image_or_version_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    data = suites(tmp_path / "data", "vsr")
    [(suite, questions)] = data
    evaluate(ScriptedModel(), data, out, ALONE, 3)

    first, *rest = questions.questions
    changed = replace(questions, questions=[replace(first, message="Otherwise?"), *rest])
    model = ScriptedModel()
    evaluate(model, [(suite, changed)], out, ALONE, 3)
    assert model.asked == [first.id]

    write_image(Path(first.image), (80, 60))
    model = ScriptedModel()
    evaluate(model, data, out, ALONE, 3)
    assert model.asked == [first.id]

    monkeypatch.setattr(VSR, "version", 2)
    model = ScriptedModel()
    evaluate(model, data, out, ALONE, 3)
    assert sorted(model.asked) == sorted(ids(data))


def test_a_larger_subset_asks_only_its_new_questions(tmp_path: Path) -> None:
    small, large = ScriptedModel(), ScriptedModel()
    results = evaluate(small, suites(tmp_path, "pope", "gqa", limit=1), tmp_path / "out", ALONE, 3)
    assert results is not None
    assert [results["benchmarks"][name]["limit"] for name in ("pope", "gqa")] == [1, 1]
    everything = suites(tmp_path, "pope", "gqa")
    evaluate(large, everything, tmp_path / "out", ALONE, 3)
    assert len(small.asked) == 4
    assert sorted(small.asked + large.asked) == sorted(ids(everything))


def test_ranks_share_the_questions(
    asked: Suites, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DistributedContext, "barrier", lambda self: None)
    shares = []
    for rank in (2, 1):  # the main rank comes last
        model = ScriptedModel()
        pending = [run._keyed(model, s, q) for s, data in asked for q in data.questions]
        run.answer_pending(model, pending, tmp_path, DistributedContext(rank, 3, rank, CPU), 2)
        shares.append(model.asked)
    main = ScriptedModel()
    pending = [run._keyed(main, s, q) for s, data in asked for q in data.questions]
    run.answer_pending(main, pending, tmp_path, DistributedContext(0, 3, 0, CPU), 2)
    assert sorted([*shares[0], *shares[1], *main.asked]) == sorted(ids(asked))
    assert max(map(len, (*shares, main.asked))) - min(map(len, (*shares, main.asked))) <= 1
    evaluate(
        ScriptedModel(patience=0), asked, tmp_path, ALONE, 3
    )  # one rank continues the evaluation of three
    assert_same(tmp_path, whole)


def test_answers_that_cannot_be_scored_are_refused_before_the_model_is_asked(
    asked: Suites, tmp_path: Path
) -> None:
    model = ScriptedModel(frame=None)
    with pytest.raises(UserError, match="does not declare the frame of its boxes"):
        evaluate(model, asked, tmp_path, ALONE, 3)
    published = suites(tmp_path, "refcoco")
    published[0][0].scoring = "published"
    with pytest.raises(UserError, match="use --scoring default"):
        evaluate(ScriptedModel(frame=BoxFrame("padded-square")), published, tmp_path, ALONE, 3)
    suite, data = suites(tmp_path, "pope")[0]
    long = [replace(question, choices=("Certainly", "No")) for question in data.questions]
    with pytest.raises(UserError, match="too long"):
        evaluate(ScriptedModel(), [(suite, replace(data, questions=long))], tmp_path, ALONE, 3)
    assert model.asked == []
    assert not (tmp_path / "responses").exists()
