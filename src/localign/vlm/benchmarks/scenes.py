"""Questions on drawn scenes, of the same kinds as the benchmarks' questions, and the scores of guessing."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, TypedDict

import numpy as np

from localign.errors import UserError
from localign.statistics.resampling import Statistic
from localign.text.reading import read_json
from localign.vlm.data.scene_dataset import QUESTIONS_FILE, SETTINGS_FILE, DatasetQuestion, read_questions
from localign.vlm.data.scene_questions import KINDS, box_text
from localign.vlm.scoring.base import Counts
from localign.vlm.scoring.boxes import ORIGINAL, Size
from localign.vlm.scoring.metrics import Ratio, rows_by
from localign.vlm.scoring.normalisation import strict
from localign.vlm.scoring.open_ended import scores_of
from localign.vlm.scoring.questions import Answer, AnswerScore, Payload, Question, Sample
from localign.vlm.scoring.readers import field, four_numbers
from localign.vlm.scoring.referring import Referring, box_metrics, checked_box

_OBJECT = re.compile(r"\ban? (\w+ \w+)")


class Scenes(Referring):
    """Questions on scenes. The data root is a folder of ``write_dataset``, and each kind of question is a split.

    All answers are in words. ``referring`` is scored as in RefCOCO. A ``caption`` scores the number of objects that
    it and the expected caption both name, over the number that either names. Any other answer is right if it equals
    the expected answer after both are normalised alike.
    """

    name = "scenes"
    splits = KINDS
    threshold = 0.5
    expected: ClassVar[Counts] = {}
    """Empty: there is no official number of questions."""
    headline = tuple(f"accuracy__Scenes-{kind}" for kind in KINDS)

    def parts(self) -> dict[str, tuple[str, ...]]:
        return {"Scenes-referring": ("referring",)}

    def files(self, root: Path) -> tuple[Path, ...]:
        return root / QUESTIONS_FILE, root / SETTINGS_FILE

    def questions(self, root: Path) -> Iterator[Question]:
        path, settings = self.files(root)
        asked = read_questions(path)
        side = field(field(read_json(settings), "world", dict, settings), "image_size", int, settings)
        for question in asked:
            yield _question(question, Size(side, side), f"{path}, question {question.id}")

    def score_answer(self, question: Question, answer: Answer) -> AnswerScore:
        if question.split == "referring":
            return super().score_answer(question, answer)
        truth = question.payload["answer"]
        if question.split == "caption":
            named, expected = _objects(answer.text), _objects(truth)
            score, parsed = len(named & expected) / len(named | expected), ", ".join(sorted(named))
        else:
            parsed = strict(answer.text)
            score = float(parsed == strict(truth))
        return {"score": score, "parsed": parsed, "truth": truth}

    def metrics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        """The mean score of every kind that occurs, and the other box metrics."""
        scores, rows = scores_of(samples), rows_by(sample["split"] for sample in samples)
        found: dict[str, Statistic] = {
            f"accuracy__Scenes-{kind}": Ratio(scores[rows[kind]], rows=rows[kind])
            for kind in KINDS
            if len(rows[kind])
        }
        if len(rows["referring"]):
            found |= box_metrics(samples, {"Scenes-referring": rows["referring"]})
        return found


def _question(asked: DatasetQuestion, size: Size, where: str) -> Question:
    kind, box = asked.question.kind, asked.question.box
    if kind not in KINDS:
        raise UserError(f"{where}: unknown kind of question {kind!r}; known: {', '.join(KINDS)}")
    payload: Payload = {"answer": asked.question.answer}
    if kind == "referring":
        shares = four_numbers(None if box is None else list(box), "boxes", where)
        payload["box"] = checked_box(ORIGINAL.to_pixels(shares, size), size, where)
        payload["size"] = tuple(size)
    elif kind == "caption" and not _objects(asked.question.answer):
        raise UserError(f"{where}: the caption {asked.question.answer!r:.60} names no object")
    return Question(asked.id, str(asked.image), asked.question.message, kind, payload)


def _objects(caption: str) -> set[str]:
    """The objects that a caption names, such as "red circle"."""
    return set(_OBJECT.findall(caption.lower()))


# -- guessing ------------------------------------------------------------------------------------------------


class Guess(TypedDict):
    """Mean scores of answers that ignore the image, 0..1."""

    majority: float
    """Score of the most common answer of the kind, or of its median box, given to every question."""
    blind: float
    """Score of the most common answer to the same question text; of ``majority`` for a text that did not occur."""


def guessing(known: Iterable[Question], asked: Iterable[Question]) -> dict[str, Guess]:
    """The scores of a model that has memorised the questions and answers of ``known`` and sees no image.

    Args:
        known: Questions of :class:`Scenes`, for example the training questions.
        asked: Questions to score, for example the test questions; ``known`` has all of their kinds.

    Returns:
        By kind of question.
    """
    memorised, suite = _by_kind(known), Scenes()
    return {kind: _guess(suite, memorised[kind], questions) for kind, questions in _by_kind(asked).items()}


def _guess(suite: Scenes, known: Sequence[Question], asked: Sequence[Question]) -> Guess:
    by_message: dict[str, list[Question]] = defaultdict(list)
    for question in known:
        by_message[question.message].append(question)
    majority = _best_constant(known)
    blind = {message: _best_constant(questions) for message, questions in by_message.items()}

    def score(question: Question, text: str) -> float:
        return float(suite.score(question, Answer(text, frame=ORIGINAL))["score"])

    return {
        "majority": float(np.mean([score(q, majority) for q in asked])),
        "blind": float(np.mean([score(q, blind.get(q.message, majority)) for q in asked])),
    }


def _best_constant(questions: Sequence[Question]) -> str:
    """The median box, or the most common answer."""
    boxes = [
        ORIGINAL.from_pixels(q.payload["box"], Size(*q.payload["size"]))
        for q in questions
        if "box" in q.payload
    ]
    if boxes:
        return box_text(np.median(np.array(boxes), axis=0).tolist())
    return Counter(str(question.payload["answer"]) for question in questions).most_common(1)[0][0]


def _by_kind(questions: Iterable[Question]) -> dict[str, list[Question]]:
    kinds: dict[str, list[Question]] = {}
    for question in questions:
        kinds.setdefault(question.split, []).append(question)
    return {kind: kinds[kind] for kind in KINDS if kind in kinds}
