"""Questions on drawn scenes as a benchmark: reading, refusals, scores, and the scores of guessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_files import scored, words, write_json, write_scenes
from bench_models import ALONE, ScriptedModel

from localign.cli import main
from localign.data.scenes import SceneConfig, SceneSource
from localign.errors import UserError
from localign.vlm.benchmarks.scenes import Scenes, guessing
from localign.vlm.data.scene_dataset import write_dataset
from localign.vlm.data.scene_questions import KINDS, make_questions
from localign.vlm.evaluation.run import evaluate
from localign.vlm.scoring.boxes import ORIGINAL, BoxFrame, Size
from localign.vlm.scoring.intervals import intervals
from localign.vlm.scoring.questions import Answer, Question, Sample

SUITE = Scenes()


def asking(kind: str, answer: str, message: str = "Which?") -> Question:
    return Question("0", "0.png", message, kind, {"answer": answer})


def box_question(*corners: float) -> Question:
    return Question("0", "0.png", "Which?", "referring", {"answer": "", "box": corners, "size": (100, 100)})


def score(question: Question, text: str) -> float:
    return float(SUITE.score(question, Answer(text, frame=ORIGINAL))["score"])


# -- reading -------------------------------------------------------------------------------------------------


def test_questions_are_the_written_ones(tmp_path: Path) -> None:
    data = SUITE.read(write_scenes(tmp_path, scenes=12))
    assert (data.deviations, {q.mode for q in data.questions}) == ((), {"text"})
    world, source = SceneConfig(), SceneSource(None, "test", 12)
    expected = {
        f"test-{index:06d}-{turn}": question
        for index in range(12)
        for turn, question in enumerate(
            make_questions(
                world, source.scene(index), seed=0, split="test", index=index, kinds=KINDS, count=len(KINDS)
            )
        )
    }
    assert {q.id: (q.split, q.message, q.payload["answer"]) for q in data.questions} == {
        name: (question.kind, question.message, question.answer) for name, question in expected.items()
    }
    for question in data.questions:
        assert Path(question.image) == tmp_path / "images" / f"{question.id.split('-')[1]}.png"
        if question.split == "referring":
            shares = ORIGINAL.from_pixels(question.payload["box"], Size(*question.payload["size"]))
            assert shares == pytest.approx(expected[question.id].box)


def test_every_expected_answer_is_right(tmp_path: Path) -> None:
    data = SUITE.read(write_scenes(tmp_path, scenes=20))
    samples = scored(SUITE, data, words({q.id: q.payload["answer"] for q in data.questions}))
    assert {sample["split"] for sample in samples} == set(KINDS)
    assert {sample["score"] for sample in samples} == {1.0}


def test_a_limit_is_of_every_kind(tmp_path: Path) -> None:
    data = SUITE.read(write_scenes(tmp_path, scenes=20), limit=2)
    assert sorted(q.split for q in data.questions) == sorted([*KINDS, *KINDS])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"kinds": ["colour"]}, "question test-000000-0: unknown kind of question 'colour'"),
        ({"kinds": ["referring", "count"]}, "no file of questions about scenes"),
        ({"boxes": [None]}, "question test-000000-0: the field 'boxes' is None, not four numbers"),
        ({"boxes": [[0.1, 0.2, 0.3]]}, "not four numbers"),
        ({"boxes": [[0.5, 0.2, 0.5, 0.4]]}, r"the box \[.*\] does not fit in an image of"),
        ({"boxes": [[0.5, 0.2, 1.5, 0.4]]}, r"the box \[.*\] does not fit in an image of"),
        ({"kinds": ["caption"], "boxes": [None]}, "names no object"),
        ({"conversations": None}, "no file of questions about scenes"),
    ],
)
def test_bad_records_are_named(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    path = write_scenes(tmp_path, scenes=2, kinds=("referring",), questions=1) / "questions.json"
    first, *rest = json.loads(path.read_text())
    write_json(path, [first | changes, *rest])
    with pytest.raises(UserError, match=line) as refusal:
        SUITE.read(tmp_path, allow_partial=True)
    assert "\n" not in str(refusal.value)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there is no file of questions {tmp_path}"):
        SUITE.read(tmp_path)
    write_scenes(tmp_path)
    (tmp_path / "settings.json").write_text('{"world": {}}')
    with pytest.raises(UserError, match=r"settings\.json: the field 'image_size' is missing"):
        SUITE.read(tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UserError, match=r"there is no file .*settings\.json"):
        SUITE.read(tmp_path)


# -- scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right", "fault"),
    [
        ("[0.20, 0.20, 0.60, 0.60]", 1.0, None),
        (" [0.2,0.2,0.6,0.6]\n", 1.0, None),
        ("The box is [0.20, 0.20, 0.60, 0.60].", 1.0, None),
        ("[0.20, 0.20, 0.60, 0.41]", 1.0, None),  # IoU 0.525
        ("[0.20, 0.20, 0.60, 0.39]", 0.0, None),  # IoU 0.475
        ("[0.70, 0.70, 0.90, 0.90]", 0.0, None),
        ("[0.20, 0.20, 0.60]", 0.0, "no box"),
        ("[0.60, 0.20, 0.20, 0.60]", 0.0, "corners out of order"),
        ("[20, 20, 60, 60]", 0.0, "outside the frame"),
        ("red circle", 0.0, "no box"),
        ("", 0.0, "no box"),
    ],
)
def test_a_box_is_right_from_half_overlap(answer: str, right: float, fault: str | None) -> None:
    sample = SUITE.score(box_question(20, 20, 60, 60), Answer(answer, frame=ORIGINAL))
    assert (sample["score"], sample["fault"]) == (right, fault)


def test_boxes_are_read_in_the_declared_frame() -> None:
    question = box_question(20, 20, 60, 60)
    assert SUITE.score(question, Answer("[200, 200, 600, 600]", frame=BoxFrame(scale=1000)))["score"] == 1
    with pytest.raises(UserError, match="does not declare the frame of its boxes"):
        SUITE.score(question, Answer("[0.2, 0.2, 0.6, 0.6]"))
    published = Scenes("published")
    assert published.score(question, Answer("[0.2, 0.2, 0.6, 0.6].", frame=ORIGINAL))["score"] == 0
    assert Scenes().score(asking("count", "2"), Answer("2"))["score"] == 1  # no box, no frame


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("red circle", 1),
        (" Red Circle\n", 1),
        ("a red circle", 1),
        ("red circle.", 1),
        ("red", 0),
        ("red circles", 0),
        ("", 0),
    ],
)
def test_short_answers_are_right_if_they_are_the_expected_words(answer: str, right: int) -> None:
    assert score(asking("position", "red circle"), answer) == right


@pytest.mark.parametrize(
    ("kind", "truth", "answer", "right"),
    [
        ("count", "2", "two", 1),
        ("choice", "A", "A", 1),
        ("choice", "A", "the", 0),
        ("relation", "True", "false", 0),
    ],
)
def test_both_sides_are_normalised_alike(kind: str, truth: str, answer: str, right: int) -> None:
    assert score(asking(kind, truth), answer) == right


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("A red circle left of a blue square, and an orange bar.", 1.0),
        ("an orange bar above a blue square, and a red circle", 1.0),  # in another order
        ("A red circle left of a blue square.", 2 / 3),
        ("A red circle left of a blue square, an orange bar and a blue ring.", 3 / 4),
        ("A red circle and a red circle.", 1 / 3),
        ("Nothing.", 0.0),
    ],
)
def test_a_caption_is_scored_by_the_objects_it_names(answer: str, value: float) -> None:
    question = asking("caption", "A red circle left of a blue square, and an orange bar.")
    assert score(question, answer) == pytest.approx(value)


def test_metrics_cover_the_kinds_that_occur() -> None:
    questions = [
        asking("count", "2"),
        asking("count", "1"),
        asking("count", "0"),
        asking("presence", "Yes"),
        box_question(0, 0, 50, 50),
        box_question(0, 0, 50, 50),
    ]
    answers = ["two", "2", "0.", "yes", "[0, 0, 0.5, 0.25]", "there"]
    samples = [
        SUITE.score(question, Answer(text, frame=ORIGINAL))
        for question, text in zip(questions, answers, strict=True)
    ]
    assert SUITE.aggregate(samples) == pytest.approx(
        {
            "accuracy__Scenes-referring": 50,
            "accuracy__Scenes-count": 200 / 3,
            "accuracy__Scenes-presence": 100,
            "invalid__Scenes-referring": 50,
            "iou__Scenes-referring": 25,
        }
    )


def test_intervals_are_over_scenes_not_questions() -> None:
    """Eight equal answers per scene give the same interval as one answer per scene."""
    scores = [1.0, 0.0, 1.0, 1.0] * 20

    def samples(turns: int) -> list[Sample]:
        return [
            {
                "id": f"{scene}-{turn}",
                "image": f"{scene}",
                "split": "count",
                "score": score,
                "parsed": "",
                "truth": "",
            }
            for scene, score in enumerate(scores)
            for turn in range(turns)
        ]

    expected = intervals(SUITE, samples(1))["accuracy__Scenes-count"]
    assert intervals(SUITE, samples(8))["accuracy__Scenes-count"] == pytest.approx(expected)


def test_the_table_of_an_evaluation_has_the_kinds_that_occur(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = SUITE.read(write_scenes(tmp_path / "data", scenes=6, kinds=("count", "referring")))
    for name in ("one", "two"):
        results = evaluate(ScriptedModel(weights=name), [(SUITE, data)], tmp_path / name, ALONE, 4)
        assert results is not None
        outcome = results["benchmarks"]["scenes"]
        assert outcome["headline"] == ["accuracy__Scenes-referring", "accuracy__Scenes-count"]
        assert set(outcome["headline"]) <= outcome["figures"].keys()
    assert (
        main(["vlm", "score", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "c")])
        == 0
    )
    assert "Scenes-referring" in capsys.readouterr().out
    assert main(["vlm", "show", str(tmp_path / "one"), "--out", str(tmp_path / "shown"), "--limit", "2"]) == 0
    assert len(list((tmp_path / "shown").iterdir())) == 2


def test_a_model_without_a_frame_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    data = SUITE.read(write_scenes(tmp_path / "data", kinds=("count", "referring")))
    model = ScriptedModel(frame=None)
    with pytest.raises(UserError, match="does not declare the frame of its boxes"):
        evaluate(model, [(SUITE, data)], tmp_path / "out", ALONE, 4)
    assert model.asked == []


# -- guessing ------------------------------------------------------------------------------------------------


def test_guessing_memorises_texts_and_sees_no_image() -> None:
    known = [asking("count", "1", "a?")] * 3 + [asking("count", "2", "b?")] * 2
    asked = [asking("count", n, f"{word}?") for word, n in ("a1", "a2", "b2", "b1", "c1", "c2")]
    found = guessing(known, asked)["count"]
    assert found["majority"] == pytest.approx(3 / 6)  # always "1"
    assert found["blind"] == pytest.approx(3 / 6)  # "1" to a, "2" to b, "1" to c
    assert guessing(known, asked[2:3])["count"] == {"majority": 0.0, "blind": 1.0}


def test_guessing_a_box_takes_the_median() -> None:
    known = [box_question(10, 10, 50, 50), box_question(20, 20, 60, 60), box_question(50, 50, 90, 90)]
    assert guessing(known, [box_question(20, 20, 60, 60)])["referring"] == {"majority": 1.0, "blind": 1.0}
    assert guessing(known, [box_question(60, 60, 90, 90)])["referring"] == {"majority": 0.0, "blind": 0.0}


def test_guessing_scores_low_on_new_scenes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", "train", 60, 8)
    known, asked = (
        list(SUITE.questions(tmp_path / "train")),
        list(SUITE.questions(write_scenes(tmp_path, 60))),
    )
    found = guessing(known, asked)
    assert list(found) == list(KINDS)
    for kind, guess in found.items():
        assert 0 < guess["majority"] < 0.7, kind
        assert 0 <= guess["blind"] < 0.7, kind
