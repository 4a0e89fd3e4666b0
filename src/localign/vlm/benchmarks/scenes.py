"""Questions on drawn scenes, of the benchmarks' kinds, and what guessing would score on them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypedDict

import numpy as np

from localign.errors import UserError
from localign.vlm.data.scene_dataset import QUESTIONS_FILE, SETTINGS_FILE, AskedQuestion, read_questions
from localign.vlm.data.scene_questions import KINDS, box_text
from localign.vlm.scoring.base import Answer, Counts, Question, Sample
from localign.vlm.scoring.boxes import ORIGINAL, Size
from localign.vlm.scoring.metrics import Ratio, Statistic, rows_by
from localign.vlm.scoring.normalisation import strict
from localign.vlm.scoring.open_ended import scores_of
from localign.vlm.scoring.readers import field, four_numbers, read_json
from localign.vlm.scoring.referring import Referring, box_figures, checked_box

_OBJECT = re.compile(r"\ban? (\w+ \w+)")


class Scenes(Referring):
    """Questions on scenes: the data root is a folder that ``write_dataset`` wrote, and a split is a kind of question.

    Every question is answered in words. ``referring`` is judged as RefCOCO is. A ``caption`` scores the objects that
    it and the expected one both name, over those that either names. The other answers are right if they are the
    expected one, both normalised alike.
    """

    name = "scenes"
    splits = KINDS
    threshold = 0.5
    expected: ClassVar[Counts] = {}
    """There is no official number: the file of questions is written whole or not at all."""
    headline = tuple(f"accuracy__Scenes-{kind}" for kind in KINDS)

    def parts(self) -> dict[str, tuple[str, ...]]:
        return {"Scenes-referring": ("referring",)}

    def questions(self, root: Path) -> Iterator[Question]:
        path = root / QUESTIONS_FILE
        asked = read_questions(path)
        settings = root / SETTINGS_FILE
        side = field(field(read_json(settings), "world", dict, settings), "image_size", int, settings)
        for one in asked:
            yield _question(one, Size(side, side), f"{path}, question {one.id}")

    def score_answer(self, question: Question, answer: Answer) -> Sample:
        if question.split == "referring":
            return super().score_answer(question, answer)
        truth = question.payload["answer"]
        if question.split == "caption":
            named, shown = _objects(answer.text), _objects(truth)
            score, parsed = len(named & shown) / len(named | shown), ", ".join(sorted(named))
        else:
            parsed = strict(answer.text)
            score = float(parsed == strict(truth))
        return {"score": score, "parsed": parsed, "truth": truth}

    def statistics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        """The mean score of every kind that is asked, and the other figures of boxes."""
        scores, rows = scores_of(samples), rows_by(sample["split"] for sample in samples)
        found: dict[str, Statistic] = {
            f"accuracy__Scenes-{kind}": Ratio(scores[rows[kind]], rows=rows[kind])
            for kind in KINDS
            if len(rows[kind])
        }
        if len(rows["referring"]):
            found |= box_figures(samples, {"Scenes-referring": rows["referring"]})
        return found


def _question(asked: AskedQuestion, size: Size, where: str) -> Question:
    kind, box = asked.question.kind, asked.question.box
    if kind not in KINDS:
        raise UserError(f"{where}: there is no kind of question {kind!r}; known: {', '.join(KINDS)}")
    payload: dict[str, object] = {"answer": asked.question.answer}
    if kind == "referring":
        shares = four_numbers(None if box is None else list(box), "boxes", where)
        payload |= {
            "box": checked_box(ORIGINAL.to_pixels(shares, size), size, where),
            "size": tuple(size),
        }
    elif kind == "caption" and not _objects(asked.question.answer):
        raise UserError(f"{where}: the caption {asked.question.answer!r:.60} names no object")
    return Question(asked.id, str(asked.image), asked.question.message, kind, payload)


def _objects(caption: str) -> set[str]:
    """The objects that a caption names, such as "red circle"."""
    return set(_OBJECT.findall(caption.lower()))


# -- guessing ------------------------------------------------------------------------------------------------


class Guess(TypedDict):
    """What can be had without looking at the image: mean scores, 0..1."""

    majority: float
    """Score of one answer to every question of the kind: the most common one, or the median box."""
    blind: float
    """Score of the most common answer to the very same words, where they occurred."""


def guessing(known: Iterable[Question], asked: Iterable[Question]) -> dict[str, Guess]:
    """What a model scores that knows the questions and answers of ``known`` by heart, and sees no image.

    Args:
        known: Of :class:`Scenes`, for example those of training.
        asked: For example those of a test; of no kind that ``known`` lacks.

    Returns:
        By kind of question.
    """
    seen, suite = _by_kind(known), Scenes()
    return {kind: _guess(suite, seen[kind], questions) for kind, questions in _by_kind(asked).items()}


def _guess(suite: Scenes, known: Sequence[Question], asked: Sequence[Question]) -> Guess:
    by_message: dict[str, list[Question]] = defaultdict(list)
    for question in known:
        by_message[question.message].append(question)
    always = _constant(known)
    learned: Mapping[str, str] = {message: _constant(questions) for message, questions in by_message.items()}

    def score(question: Question, text: str) -> float:
        return float(suite.score(question, Answer(text, frame=ORIGINAL))["score"])

    return {
        "majority": float(np.mean([score(q, always) for q in asked])),
        "blind": float(np.mean([score(q, learned.get(q.message, always)) for q in asked])),
    }


def _constant(questions: Sequence[Question]) -> str:
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
