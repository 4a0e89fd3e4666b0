"""Normalisers and soft scores equal the published evaluators; the strict normaliser is symmetric."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest

from localign.vlm.scoring import normalisation
from localign.vlm.scoring.normalisation import STRICT, TEXTVQA, VIZWIZ, VQAV2, Evaluator, soft_score, strict

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden" / "scores" / "answers.json"
EVALUATORS = {"vqav2": VQAV2, "vizwiz": VIZWIZ, "textvqa": TEXTVQA}


def agreement(rules: Evaluator, prediction: str, given: list[str]) -> float:
    return soft_score(rules.prediction(prediction), [rules.truth(answer) for answer in given])


@pytest.mark.skipif(not GOLDEN.is_file(), reason="no reference numbers in ../shared/golden")
def test_equal_to_the_reference_numbers_of_all_three_evaluators() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(golden["normalise"]) > 20
    assert len(golden["soft_scores"]) > 50
    for row in golden["normalise"]:
        assert {name: rules.prediction(row["raw"]) for name, rules in EVALUATORS.items()} == {
            name: row[name] for name in EVALUATORS
        }
    for row in golden["soft_scores"]:
        for name, rules in EVALUATORS.items():
            assert agreement(rules, row["prediction"], row["answers"]) == row[name]  # to the last bit


@pytest.mark.parametrize(
    ("text", "vqav2", "vizwiz", "textvqa"),
    [
        ("1,000 a-b", "1000 ab", "1000 ab", "1000 b"),
        ("red-white", "red white", "red white", "red white"),
        ("red -white", "red white", "red white", "red white"),
        ("dog's", "dog's", "dog's", "dog 's"),
        ("The dont", "don't", "don`t", "don't"),
        ("u.s.a.", "usa", "usa", "usa"),
        ("3.", "3", "3", "3"),
        (".5", ".5", ".5", ".5"),
        ("10% of 7:30 & #1*", "10% of 7:30 & #1*", "10% of 7:30 & #1*", "10% of 7:30 & #1*"),
        ("A", "", "", ""),
        ("", "", "", ""),
        ("aint weve ive", "ain't we've ive", "ain't we've ive", "ain't we've ive"),
        ("couldn'tve", "couldn't've", "couldn`t`ve", "couldn't've"),
        ("Größe?!", "größe", "größe", "größe"),
    ],
)
def test_normalised_by_the_published_rules(text: str, vqav2: str, vizwiz: str, textvqa: str) -> None:
    assert (normalisation.vqav2(text), normalisation.vizwiz(text), normalisation.textvqa(text)) == (
        vqav2,
        vizwiz,
        textvqa,
    )


def test_only_the_first_32_full_stops_are_deleted() -> None:
    assert normalisation.vqav2("." * 40 + "a b") == "." * 8 + "a b"


def step_by_step(text: str) -> str:
    """The published punctuation step without shortcuts."""
    result = text
    for mark in [*';/[]"{}()=+\\_-><@`,?!']:
        if mark + " " in text or " " + mark in text or re.search(r"\d,\d", text):
            result = result.replace(mark, "")
        else:
            result = result.replace(mark, " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)


def test_shortcuts_of_the_punctuation_step_change_nothing() -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("ab12 ,.-/?'é\\_", k=draw.randrange(12))) for _ in range(3000)]
    assert [VQAV2.truth(text) for text in texts] == [step_by_step(text) for text in texts]
    assert len({VQAV2.truth(text) == text for text in texts}) == 2


def test_there_are_120_contractions_and_most_of_vizwiz_have_backticks() -> None:
    assert len(normalisation.CONTRACTIONS) == len(normalisation.VIZWIZ_CONTRACTIONS) == 120
    assert (
        sum("`" in value for value in normalisation.VIZWIZ_CONTRACTIONS.values()) == 111
    )  # 8 have apostrophes, 1 has neither
    assert normalisation.VIZWIZ_CONTRACTIONS["couldn'tve"] == "couldn`t`ve"
    assert "couldnt've" not in normalisation.VIZWIZ_CONTRACTIONS


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_the_soft_score_of_ten_annotators(matches: int, score: float) -> None:
    assert soft_score("yes", ["yes"] * matches + ["no"] * (10 - matches)) == pytest.approx(score)


def test_published_sides_differ_and_strict_sides_do_not() -> None:
    two = ["two"] * 10
    assert agreement(VQAV2, "two", two) == agreement(VIZWIZ, "two", two) == 0
    assert agreement(TEXTVQA, "two", two) == agreement(STRICT, "two", two) == 1
    assert agreement(STRICT, "2", two) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The dog", "dog"),
        ("don't", "DONT"),
        ("1,000 people", "1000 people"),
        ("Twelve", "12"),
        ("red-white", "red white"),
        ("U.S.A.", "usa"),
        ("caf\u00e9", "cafe\u0301"),
        ("it\u2019s", "its"),
        ("  tabs\tand\nlines ", "tabs and lines"),
        ("yes!", "yes"),
        ("time: 7:30", "time 7:30"),
        ("none", "0"),
    ],
)
def test_strict_makes_answers_of_equal_meaning_equal(one: str, other: str) -> None:
    assert strict(one) == strict(other)


@pytest.mark.parametrize(
    ("one", "other"), [("3.5", "35"), ("a", "the"), ("7:30", "730"), ("?", "!"), ("1,5", "15")]
)
def test_strict_keeps_answers_of_different_meaning_apart(one: str, other: str) -> None:
    assert strict(one) != strict(other)


def test_strict_leaves_no_answer_empty_and_is_idempotent() -> None:
    assert [strict(text) for text in ("A", "the", "?", "'", "", "  ")] == ["a", "the", "?", "'", "", ""]
    draw = random.Random(1)
    for _ in range(3000):
        text = "".join(
            draw.choices("aZ15 ,.-:%'\u2019\u00e9\u0301\u00bd\u00df\u3000\n_", k=draw.randrange(10))
        )
        once = strict(text)
        assert strict(once) == once
        assert bool(once) == bool(text.strip())


@pytest.mark.slow
def test_200000_questions_are_scored_in_20_seconds() -> None:
    draw = random.Random(0)
    vocabulary = [
        f"{a}{mark}{b}" for a in ("red", "the", "two", "dont") for mark in " -/," for b in range(500)
    ]
    questions = [
        (draw.choice(vocabulary), [draw.choice(vocabulary) for _ in range(10)]) for _ in range(200_000)
    ]
    begin = time.process_time()
    for prediction, given in questions:
        agreement(VQAV2, prediction, given)
    assert time.process_time() - begin < 20
