"""Questions of evaluations, with the answers of several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from PIL import Image

from localign.errors import UserError
from localign.explore.page import data_uri
from localign.text.printing import printable
from localign.vlm.data.images import open_image
from localign.vlm.evaluation.results import ANSWERS_FILE, AnswerRecord, read_answers

SIDE = 448
"""Longer side of a question's image, pixels."""
_LONGEST = 2000
"""Characters of one text."""


class ModelAnswer(TypedDict):
    """One model's answer."""

    text: str
    score: float
    box: list[float] | None
    """Left, top, right and bottom as shares of the image; None without one."""


class AskedQuestion(TypedDict):
    """One question with all answers."""

    benchmark: str
    id: str
    message: str
    image: int | None
    """Number of the image; None if it cannot be read."""
    truth: str
    box: list[float] | None
    """The true box."""
    answers: list[ModelAnswer]
    """By model."""
    disagree: bool
    """Whether the answers have different scores."""


@dataclass(frozen=True)
class Answers:
    """The questions of a page."""

    models: list[str]
    questions: list[AskedQuestion]
    images: list[str]
    """Data URIs."""
    common: int
    """Questions that all models were asked."""
    disagreements: int
    """Of these, with different scores."""
    unreadable: int
    """Of the page's questions, without a readable image."""


def read_common_answers(folders: Mapping[str, str], limit: int) -> Answers:
    """The questions that all models answered; those with the largest difference in score first.

    Args:
        folders: Name -> folder of `localign vlm eval`.
        limit: The largest number of questions.

    Raises:
        UserError: A folder has no answers, or the models have no question in common.
    """
    models = [_by_question(folder) for folder in folders.values()]
    keys = [key for key in models[0] if all(key in other for other in models[1:])]
    asked = [[answers[key] for answers in models] for key in keys]
    asked = [records for records in asked if len({record["message"] for record in records}) == 1]
    if not asked:
        raise UserError("the evaluations of --vlm have no question in common; evaluate the same benchmarks")
    asked.sort(key=lambda records: (-_spread(records), len({str(r["parsed"]) for r in records}) == 1))
    images: dict[str, str | None] = {}
    numbers: dict[str, int] = {}
    questions = []
    for records in asked[:limit]:
        path = records[0]["image"]
        if path not in images:
            images[path] = _picture(path)
            if images[path] is not None:
                numbers[path] = len(numbers)
        questions.append(_question(records, numbers.get(path)))
    return Answers(
        models=list(folders),
        questions=questions,
        images=[uri for uri in images.values() if uri is not None],
        common=len(asked),
        disagreements=sum(_spread(records) > 0 for records in asked),
        unreadable=sum(question["image"] is None for question in questions),
    )


def _by_question(folder: str) -> dict[tuple[str, str], AnswerRecord]:
    path = Path(folder)
    records = read_answers(path / ANSWERS_FILE if path.is_dir() else path)
    return {(name, record["id"]): record for name, own in records.items() for record in own}


def _spread(records: Sequence[AnswerRecord]) -> float:
    scores = [record["score"] for record in records]
    return float(max(scores) - min(scores))


def _picture(path: str) -> str | None:
    """A data URI, or None. Only files are read: a page must not depend on what an address answers."""
    if not Path(path).is_file():
        return None
    try:
        picture = open_image(path)
    except UserError:
        return None
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return data_uri(picture)


def _question(records: Sequence[AnswerRecord], image: int | None) -> AskedQuestion:
    first = records[0]
    has_box = isinstance(first["payload"].get("box"), list)
    truth = first["truth"]
    return {
        "benchmark": printable(first["benchmark"]),
        "id": printable(first["id"])[:_LONGEST],
        "message": _lines(first["message"]),
        "image": image,
        "truth": "" if has_box else _truth_text(truth),
        "box": _shares(truth) if has_box else None,
        "answers": [
            {
                "text": _answer_text(record),
                "score": float(record["score"]),
                "box": _shares(record["parsed"]) if has_box else None,
            }
            for record in records
        ],
        "disagree": _spread(records) > 0,
    }


def _lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.splitlines())[:_LONGEST]


def _truth_text(truth: object) -> str:
    """Annotators' answers without repetitions."""
    parts = [truth] if isinstance(truth, str) else truth if isinstance(truth, list | tuple) else []
    return _lines(", ".join(dict.fromkeys(map(str, parts))))


def _answer_text(record: AnswerRecord) -> str:
    answer = record["answer"]
    return _lines(answer if isinstance(answer, str) else str(record["parsed"]))


def _shares(corners: object) -> list[float] | None:
    """Corners as shares of the image, cut off at its edges; None for anything but four finite numbers."""
    if not isinstance(corners, list | tuple) or len(corners) != 4:
        return None
    if not all(isinstance(c, int | float) and abs(c) < 1e9 for c in corners):
        return None
    return [round(min(max(float(c), 0.0), 1.0), 4) for c in corners]
