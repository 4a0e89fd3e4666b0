"""Metrics of every benchmark, worked out by hand from scripted answers to miniatures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_files import (
    WRITERS,
    by_id,
    likely,
    scored,
    words,
    write_ai2d,
    write_gqa,
    write_json,
    write_pope,
    write_tallyqa,
    write_textvqa,
    write_vizwiz,
    write_vqav2,
    write_vsr,
)

from localign.errors import RunFailure
from localign.vlm.benchmarks.table import benchmark
from localign.vlm.scoring.questions import Answer


def sixteen(**probabilities: float) -> list[float]:
    """Probabilities by answer, as in ``n3=0.5``; 0 for the other answers."""
    return [probabilities.get(f"n{answer}", 0.0) for answer in range(16)]


def test_tallyqa(tmp_path: Path) -> None:
    suite = benchmark("tallyqa")
    data = suite.read(write_tallyqa(tmp_path), allow_partial=True)
    script = {
        "1": sixteen(n0=0.6, n1=0.4),  # truth 0
        "2": sixteen(n0=0.7, n1=0.3),  # truth 1: wrong
        "3": sixteen(n0=0.2, n1=0.8),  # truth 1
        "4": sixteen(n15=0.001),  # truth 15; probabilities are divided by their sum
        "5": sixteen(n2=0.5, n3=0.5),  # truth 2; the first of equally probable choices
    }
    figures = suite.aggregate(scored(suite, data, likely(script)))
    # simple, 0 against 1: 0.6 lies below one of 0.7 and 0.2, so 1/2; 0.3 and 0.8 around 0.4, so 1/2.
    # Average precision of 0: 0.7 before it, so 1/2; of 1: 1 at 0.8, 2/3 at 0.3, so 5/6.
    # complex: everything in order. final: 6 pairs of the classes 0, 1, 2, 15, of which only 0 and 1 overlap.
    assert figures == pytest.approx(
        {
            "accuracy__TallyQA-simple-Accuracy": 200 / 3,
            "accuracy__TallyQA-simple-AUCROC": 50,
            "accuracy__TallyQA-simple-AUCPR": 100 * (1 / 2 + 5 / 6) / 2,
            "accuracy__TallyQA-complex-Accuracy": 100,
            "accuracy__TallyQA-complex-AUCROC": 100,
            "accuracy__TallyQA-complex-AUCPR": 100,
            "accuracy__TallyQA-final-Accuracy": 80,
            "accuracy__TallyQA-final-AUCROC": 100 * 5.5 / 6,
            "accuracy__TallyQA-final-AUCPR": 100 * (1 / 2 + 5 / 6 + 1 + 1) / 4,
        }
    )


def test_vsr(tmp_path: Path) -> None:
    suite = benchmark("vsr")
    data = suite.read(write_vsr(tmp_path), allow_partial=True)
    script = {"0": (0.9, 0.1), "1": (0.4, 0.6), "2": (0.3, 0.7), "3": (0.3, 0.7)}  # truth: T F T F
    samples = scored(suite, data, likely(script))
    # ROC: of four pairs 0.9 wins two, 0.3 loses one and ties one: 2.5 / 4.
    # Precision: 1 at 0.9; 2 of 4 at 0.3: (1 + 1/2) / 2.
    assert suite.aggregate(samples) == pytest.approx(
        {"accuracy__VSR-ExactMatch": 75, "accuracy__VSR-AUCROC": 62.5, "accuracy__VSR-AUCPR": 75}
    )
    assert by_id(samples)["2"]["parsed"] == "False"
    assert by_id(samples)["2"]["truth"] == "True"


@pytest.mark.parametrize(
    ("labels", "exact", "precision"),
    [((1, 1), 50.0, 100.0), ((0, 0), 50.0, None)],
    ids=["all true", "all false"],
)
def test_a_missing_class_leaves_metrics_undefined(
    tmp_path: Path, labels: tuple[int, ...], exact: float, precision: float | None
) -> None:
    suite = benchmark("vsr")
    data = suite.read(write_vsr(tmp_path, labels), allow_partial=True)
    samples = scored(suite, data, likely({"0": (0.9, 0.1), "1": (0.2, 0.8)}))
    assert suite.aggregate(samples) == {
        "accuracy__VSR-ExactMatch": exact,
        "accuracy__VSR-AUCROC": None,
        "accuracy__VSR-AUCPR": precision,
    }


def test_ai2d(tmp_path: Path) -> None:
    suite = benchmark("ai2d")
    data = suite.read(write_ai2d(tmp_path), allow_partial=True)
    script = {
        "2-0": (0.1, 0.2, 0.3, 0.4),  # truth D, the one question of "val"
        "10-0": (0.25, 0.25, 0.25, 0.25),  # truth A: the first of equally probable choices
        "10-1": (0.5, 0.3, 0.1, 0.1),  # truth B: wrong
    }
    figures = suite.aggregate(scored(suite, data, likely(script)))
    # test, A against B: 0.25 below 0.5, so 0; 0.3 above 0.25, so 1. Average precision: 1/2 and 1.
    # final: A, B, D; only A and B overlap.
    assert figures == pytest.approx(
        {
            "accuracy__AI2D-val-Accuracy": 100,
            "accuracy__AI2D-val-AUCROC": None,
            "accuracy__AI2D-val-AUCPR": 100,
            "accuracy__AI2D-test-Accuracy": 50,
            "accuracy__AI2D-test-AUCROC": 50,
            "accuracy__AI2D-test-AUCPR": 75,
            "accuracy__AI2D-final-Accuracy": 200 / 3,
            "accuracy__AI2D-final-AUCROC": 100 * 2.5 / 3,
            "accuracy__AI2D-final-AUCPR": 100 * 2.5 / 3,
        }
    )


def test_tallyqa_with_classes_and_a_split_missing(tmp_path: Path) -> None:
    root = write_tallyqa(tmp_path)
    path = root / "download/tally-qa/test.json"
    write_json(
        path, [record | {"answer": 1} for record in json.loads(path.read_text()) if record["issimple"]]
    )
    suite = benchmark("tallyqa")
    data = suite.read(root, allow_partial=True)
    figures = suite.aggregate(scored(suite, data, likely(dict.fromkeys("123", sixteen(n1=0.7, n2=0.3)))))
    known = {"Accuracy": 100, "AUCROC": None, "AUCPR": 100}  # a single class has no ROC curve
    expected: dict[str, float | None] = {
        f"accuracy__TallyQA-{part}-{figure}": value if part != "complex" else None
        for part in ("simple", "complex", "final")
        for figure, value in known.items()
    }
    assert figures == expected


@pytest.mark.parametrize(("name", "figure"), [("textvqa", "TextVQA-Pure"), ("textvqa-ocr", "TextVQA-OCR")])
def test_textvqa(tmp_path: Path, name: str, figure: str) -> None:
    suite = benchmark(name)
    data = suite.read(write_textvqa(tmp_path), allow_partial=True)
    samples = scored(suite, data, words({"34602": "Nokia", "34603": "Five", "34604": "ZÜRICH."}))
    # eight annotators say "nokia"; four say "5" once "the 5" and "five" are both rewritten; two say "zürich"
    assert [by_id(samples)[name]["score"] for name in ("34602", "34603", "34604")] == pytest.approx(
        [1, 1, 0.6]
    )
    assert suite.aggregate(samples) == pytest.approx({f"accuracy__{figure}": 260 / 3})


VQA = {
    "262148000": "Left/right",  # four annotators: 1
    "262148001": "two",  # becomes "2", which two annotators wrote: 0.6; strictly nine: 1
    "262148002": "Yes.",  # nine: 1
    "393225000": "The na\u00efve caf\u00e9",  # three: 0.9
}


def test_vqav2(tmp_path: Path) -> None:
    suite = benchmark("vqav2")
    data = suite.read(write_vqav2(tmp_path), allow_partial=True)
    assert suite.aggregate(scored(suite, data, words(VQA))) == pytest.approx(
        {
            "accuracy": 87.5,
            "accuracy-by-answer-type[number]": 60,
            "accuracy-by-answer-type[other]": 95,
            "accuracy-by-answer-type[yes/no]": 100,
            "accuracy-by-question-type[how many]": 60,
            "accuracy-by-question-type[is the]": 100,
            "accuracy-by-question-type[what is]": 95,
        }
    )
    symmetric = benchmark("vqav2", "strict")
    assert symmetric.aggregate(scored(symmetric, data, words(VQA)))["accuracy"] == pytest.approx(97.5)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("vqav2", {"262148000": 0, "262148001": 0.3, "262148002": 0, "393225000": 0}),
        ("textvqa", {"34602": 0.3, "34603": 0, "34604": 0}),
        ("vizwiz", {"0": 0, "1": 0.3, "2": 0, "3": 0}),
        ("gqa", {"201307251": 0, "201640614": 0, "202225914": 0}),
        ("ocid-ref", dict.fromkeys(("12", "13", "14", "15", "16", "17"), 0)),
    ],
)
def test_an_empty_answer_matches_an_empty_annotation_as_published(
    tmp_path: Path, name: str, scores: dict[str, float]
) -> None:
    suite = benchmark(name)
    data = suite.read(WRITERS[name](tmp_path), allow_partial=True)
    samples = by_id(scored(suite, data, words(dict.fromkeys(scores, ""))))
    assert {name: sample["score"] for name, sample in samples.items()} == pytest.approx(scores)


def test_vizwiz(tmp_path: Path) -> None:
    suite = benchmark("vizwiz")
    data = suite.read(write_vizwiz(tmp_path), allow_partial=True)
    script = {
        "0": "Basil",  # five annotators: 1
        "1": "Unanswerable",  # nine: 1
        "2": "blurry",  # no annotator, and the question cannot be answered
        "3": "unanswerable.",  # no annotator; the question can be answered
    }
    # Predicted unanswerable: 1 and 3; unanswerable: 1 and 2. Precision is 1 of 2 among these, 2 of 4 among all.
    assert suite.aggregate(scored(suite, data, words(script))) == pytest.approx(
        {
            "accuracy__VizWiz-Overall": 50,
            "accuracy__VizWiz-Answerable": 50,
            "accuracy__VizWiz-Unanswerable": 50,
            "accuracy__VizWiz-Unanswerable-AvgPR": 50,
            "accuracy__VizWiz-Unanswerable-F1": 50,
        }
    )


def test_vizwiz_normalises_annotators_only_if_strict(tmp_path: Path) -> None:
    data = benchmark("vizwiz").read(write_vizwiz(tmp_path), allow_partial=True)
    for scoring, dont_know, two in (("published", 0.0, 0.6), ("strict", 0.9, 1.0)):
        suite = benchmark("vizwiz", scoring)
        question = next(question for question in data.questions if question.id == "3")
        assert suite.score(question, Answer("dont know"))["score"] == pytest.approx(dont_know)
        assert suite.score(question, Answer("two"))["score"] == pytest.approx(two)


def test_vizwiz_without_questions_that_have_no_answer(tmp_path: Path) -> None:
    suite = benchmark("vizwiz")
    data = suite.read(write_vizwiz(tmp_path, [(1, ["cup"] * 10)]), allow_partial=True)
    assert suite.aggregate(scored(suite, data, words({"0": "cup"}))) == {
        "accuracy__VizWiz-Overall": 100,
        "accuracy__VizWiz-Answerable": 100,
        "accuracy__VizWiz-Unanswerable": None,
        "accuracy__VizWiz-Unanswerable-AvgPR": None,
        "accuracy__VizWiz-Unanswerable-F1": None,
    }


def test_pope(tmp_path: Path) -> None:
    suite = benchmark("pope")
    data = suite.read(write_pope(tmp_path, ("yes", "no", "no")), allow_partial=True)
    script = {
        "adversarial-1": (0.9, 0.1),  # yes
        "adversarial-2": (0.6, 0.4),  # no: wrong
        "popular-1": (0.8, 0.2),  # yes
        "popular-2": (0.2, 0.8),  # no
        "random-1": (0.3, 0.7),  # yes: wrong
        "random-2": (0.4, 0.6),  # no
        "random-3": (0.1, 0.9),  # no
    }
    figures = suite.aggregate(scored(suite, data, likely(script)))
    expected = {
        "accuracy__POPE-adversarial-Accuracy": 50,
        "accuracy__POPE-popular-Accuracy": 100,
        "accuracy__POPE-random-Accuracy": 200 / 3,
        "accuracy__POPE-final-Accuracy": 100 * (1 / 2 + 1 + 2 / 3) / 3,
        "accuracy__POPE-pooled-Accuracy": 500 / 7,
        "accuracy__POPE-adversarial-AUCROC": 100,
        "accuracy__POPE-random-AUCROC": 50,  # 0.3 between 0.4 and 0.1
        "accuracy__POPE-random-AUCPR": 50,
        "accuracy__POPE-final-AUCROC": 1000 / 12,  # 0.9 and 0.8 win all four, 0.3 wins two
        "accuracy__POPE-final-AUCPR": 100 * (1 + 1 + 3 / 5) / 3,
        "POPE-adversarial-Precision": 50,
        "POPE-adversarial-Recall": 100,
        "POPE-adversarial-F1": 200 / 3,
        "POPE-adversarial-YesShare": 100,
        "POPE-random-Precision": None,  # no answer is yes
        "POPE-random-Recall": 0,
        "POPE-random-F1": 0,
        "POPE-random-YesShare": 0,
        "POPE-final-Precision": 200 / 3,
        "POPE-final-Recall": 200 / 3,
        "POPE-final-F1": 200 / 3,
        "POPE-final-YesShare": 300 / 7,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_pope_with_a_class_missing_in_one_split(tmp_path: Path) -> None:
    suite = benchmark("pope")
    data = suite.read(write_pope(tmp_path, ("no", "no")), allow_partial=True)
    names = [f"{split}-{number}" for split in suite.splits for number in (1, 2)]
    figures = suite.aggregate(scored(suite, data, likely(dict.fromkeys(names, (0.2, 0.8)))))
    assert figures["accuracy__POPE-random-AUCROC"] is None
    assert figures["accuracy__POPE-random-Accuracy"] == 100
    assert figures["accuracy__POPE-final-Accuracy"] == pytest.approx(200 / 3)
    assert figures["accuracy__POPE-final-AUCROC"] == 50  # all tied


def test_gqa(tmp_path: Path) -> None:
    script = words({"201307251": "Yes.", "201640614": "T-shirt", "202225914": "not balanced, so not counted"})
    for scoring, figure in (("published", 50), ("strict", 100)):
        suite = benchmark("gqa", scoring)
        data = suite.read(write_gqa(tmp_path), allow_partial=True)
        samples = scored(suite, data, script)
        assert suite.aggregate(samples) == {"accuracy": figure}
    assert by_id(samples)["201640614"]["parsed"] == "t shirt"


@pytest.mark.parametrize(
    "probabilities", [(), (0.5, 0.5, 0.0), (float("nan"), 0.5), (0.0, 0.0), (-0.1, 0.5), (float("inf"), 0.5)]
)
def test_invalid_probabilities_stop_the_run(tmp_path: Path, probabilities: tuple[float, ...]) -> None:
    suite = benchmark("vsr")
    question = suite.read(write_vsr(tmp_path), allow_partial=True).questions[0]
    with pytest.raises(RunFailure, match=f"question {question.id}"):
        suite.score(question, Answer(probabilities=probabilities))
