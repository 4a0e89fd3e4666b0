"""Scores of answers to questions on scenes."""

from __future__ import annotations

from pathlib import Path

import pytest

from localign.data.scenes import SceneConfig, SceneSource
from localign.vlm.questions import KINDS, AskedQuestion, Question, questions_of
from localign.vlm.scoring import Scored, guessing, score, score_answer, summarise

REFERRING = Question("referring", "Where is it?", "[0.20, 0.20, 0.60, 0.60]", (0.2, 0.2, 0.6, 0.6))


@pytest.mark.parametrize(
    ("answer", "right", "valid"),
    [
        ("[0.20, 0.20, 0.60, 0.60]", 1.0, True),
        (" [0.2,0.2,0.6,0.6]\n", 1.0, True),
        ("[0.20, 0.20, 0.60, 0.41]", 1.0, True),  # IoU 0.525
        ("[0.20, 0.20, 0.60, 0.39]", 0.0, True),  # IoU 0.475
        ("[0.70, 0.70, 0.90, 0.90]", 0.0, True),
        ("[0.20, 0.20, 0.60, 0.60].", 0.0, False),
        ("The box is [0.20, 0.20, 0.60, 0.60]", 0.0, False),
        ("(0.20, 0.20, 0.60, 0.60)", 0.0, False),
        ("[0.20, 0.20, 0.60]", 0.0, False),
        ("[0.60, 0.20, 0.20, 0.60]", 0.0, False),
        ("[20, 20, 60, 60]", 0.0, False),
        ("[0.20, 0.20, 0.60, 0.6", 0.0, False),
        ("red circle", 0.0, False),
        ("", 0.0, False),
    ],
)
def test_a_box_is_right_from_half_overlap_and_must_stand_alone(
    answer: str, right: float, valid: bool
) -> None:
    assert score_answer("referring", answer, REFERRING) == right
    scored = score(AskedQuestion("test-0", Path("0.png"), REFERRING), answer)
    assert (scored.score, scored.valid, scored.kind, scored.image) == (right, valid, "referring", "0.png")


@pytest.mark.parametrize(
    ("answer", "right"),
    [("red circle", 1), (" Red Circle\n", 1), ("red", 0), ("a red circle", 0), ("red circle.", 0), ("", 0)],
)
def test_short_answers_are_right_if_they_are_the_expected_words(answer: str, right: int) -> None:
    question = Question("position", "What is it?", "red circle")
    assert score_answer("position", answer, question) == right
    assert score(AskedQuestion("test-0", Path("0.png"), question), answer).valid


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
    question = Question("caption", "What?", "A red circle left of a blue square, and an orange bar.")
    assert score_answer("caption", answer, question) == pytest.approx(value)


def test_every_expected_answer_is_right() -> None:
    world, source = SceneConfig(), SceneSource(None, "test", 20)
    for index in range(20):
        for question in questions_of(
            world, source.scene(index), seed=0, split="test", index=index, kinds=KINDS, count=8
        ):
            assert score_answer(question.kind, question.answer, question) == 1.0


def scored(kind: str, scores: list[float]) -> list[Scored]:
    return [Scored(f"{i:03d}.png", kind, value, valid=True) for i, value in enumerate(scores)]


def test_a_summary_has_accuracy_interval_and_counts_per_kind() -> None:
    answers = [
        *scored("count", [1, 0, 1, 1] * 50),
        *scored("presence", [1, 1]),
        Scored("x", "referring", 0, False),
    ]
    found = summarise(answers)
    assert set(found) == {"count", "presence", "referring"}
    count = found["count"]
    assert (count["accuracy"], count["questions"], count["invalid"]) == (0.75, 200, 0)
    assert count["interval"] is not None
    low, high = count["interval"]
    # The standard error of 150 right of 200 is 3.06 points.
    assert low == pytest.approx(0.75 - 1.96 * 0.0306, abs=0.01)
    assert high == pytest.approx(0.75 + 1.96 * 0.0306, abs=0.01)
    assert found["presence"]["interval"] == [1.0, 1.0]
    assert found["referring"]["invalid"] == 1


def test_intervals_are_over_scenes_not_questions() -> None:
    """Eight answers on a scene that stand and fall together say no more than one."""
    values = [1.0, 0.0, 1.0, 1.0] * 20
    once = summarise(scored("count", values))["count"]["interval"]
    often = summarise([one for one in scored("count", values) for _ in range(8)])["count"]["interval"]
    assert often == pytest.approx(once)


def test_the_order_of_answers_does_not_matter() -> None:
    answers = scored("count", [1.0, 0.0, 0.0, 1.0, 1.0])
    assert summarise(answers) == summarise(answers[::-1])


def test_guessing_knows_words_by_heart_and_sees_nothing() -> None:
    known = [Question("count", "a?", "1")] * 3 + [Question("count", "b?", "2")] * 2
    asked = [Question("count", f"{word}?", count) for word, count in ("a1", "a2", "b2", "b1", "c1", "c2")]
    found = guessing(known, asked)["count"]
    assert found["majority"] == pytest.approx(3 / 6)  # always "1"
    assert found["blind"] == pytest.approx(3 / 6)  # "1" to a, "2" to b, "1" to c
    assert guessing(known, asked[2:3])["count"] == {"majority": 0.0, "blind": 1.0}


def test_guessing_a_box_takes_the_median() -> None:
    boxes = [(0.1, 0.1, 0.5, 0.5), (0.2, 0.2, 0.6, 0.6), (0.5, 0.5, 0.9, 0.9)]
    known = [Question("referring", "?", "", box) for box in boxes]
    assert guessing(known, [REFERRING])["referring"] == {"majority": 1.0, "blind": 1.0}
