"""Scores of answers to questions on scenes, with intervals, and what guessing would score.

The box reader is that of the benchmarks, by the published rule: the whole answer is a list of four numbers.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

import numpy as np
import torch

from localign.probing.bootstrap import interval, macro_recalls
from localign.vlm.benchmarks.boxes import ORIGINAL, overlap, parse_published
from localign.vlm.questions import AskedQuestion, Question, box_text

IOU_THRESHOLD = 0.5
_NAME = re.compile(r"\ban? (\w+ \w+)")
Item = TypeVar("Item", Question, "Scored")


@dataclass(frozen=True)
class Scored:
    """What a model got for one answer."""

    image: str
    """Which scene; intervals are over scenes."""
    kind: str
    """Of the question."""
    score: float
    """0 to 1."""
    valid: bool
    """False where a box was asked for and the answer is none."""


class Summary(TypedDict):
    """What a model got for the questions of one kind."""

    accuracy: float
    """Mean score."""
    interval: list[float] | None
    """Its 95 % bootstrap interval over scenes. Models that were asked the same questions share the draws."""
    questions: int
    """How many."""
    invalid: int
    """How many answers were no box where one was asked for; they count as wrong."""


class Guess(TypedDict):
    """What can be had without looking at the image."""

    majority: float
    """Score of one answer to every question of the kind: the most common one, or the median box."""
    blind: float
    """Score of the most common answer to the very same words, where they occurred."""


def score(asked: AskedQuestion, answer: str) -> Scored:
    """Score the answer to one question of a data set."""
    question = asked.question
    valid = question.kind != "referring" or parse_published(answer.strip(), ORIGINAL) is not None
    return Scored(str(asked.image), question.kind, score_answer(question.kind, answer, question), valid)


def score_answer(kind: str, answer: str, question: Question) -> float:
    """How good an answer is, 0 to 1.

    Args:
        kind: ``referring``: 1 if the answer is a box with an IoU of 0.5 or more. ``caption``: the objects that it
            and the expected one both name, over those that either names. Others: 1 if the answer is the
            expected one but for case and outer white space.
        answer: What the model wrote.
        question: What it was asked.
    """
    if kind == "referring":
        box, truth = parse_published(answer.strip(), ORIGINAL), question.box
        return float(box is not None and truth is not None and overlap(box, truth) >= IOU_THRESHOLD)
    if kind == "caption":
        named, shown = (set(_NAME.findall(text.lower())) for text in (answer, question.answer))
        return len(named & shown) / len(named | shown)
    return float(answer.strip().lower() == question.answer.strip().lower())


def summarise(scored: Iterable[Scored]) -> dict[str, Summary]:
    """Accuracy per kind of question."""
    return {kind: _summary(answers) for kind, answers in _by_kind(scored).items()}


def _summary(answers: Sequence[Scored]) -> Summary:
    places = {image: place for place, image in enumerate(sorted({one.image for one in answers}))}
    rows = torch.tensor([places[one.image] for one in answers])
    scores = torch.tensor([one.score for one in answers], dtype=torch.float32)
    sums, counts = (
        torch.zeros(len(places)).index_add_(0, rows, values)[:, None]
        for values in (scores, torch.ones(len(rows)))
    )
    (accuracies,) = macro_recalls([(sums, counts)])  # of one class: score over questions
    return {
        "accuracy": float(scores.mean()),
        "interval": interval(accuracies),
        "questions": len(answers),
        "invalid": sum(not one.valid for one in answers),
    }


def guessing(known: Iterable[Question], asked: Iterable[Question]) -> dict[str, Guess]:
    """What a model scores that knows the questions and answers of ``known`` by heart, and sees no image.

    Args:
        known: For example those of training.
        asked: For example those of a test; of no kind that ``known`` lacks.
    """
    seen = _by_kind(known)
    return {kind: _guess(seen[kind], questions) for kind, questions in _by_kind(asked).items()}


def _guess(known: Sequence[Question], asked: Sequence[Question]) -> Guess:
    by_message: dict[str, list[Question]] = defaultdict(list)
    for question in known:
        by_message[question.message].append(question)
    always = _constant(known)
    learned = {message: _constant(questions) for message, questions in by_message.items()}
    return {
        "majority": float(np.mean([score_answer(q.kind, always, q) for q in asked])),
        "blind": float(np.mean([score_answer(q.kind, learned.get(q.message, always), q) for q in asked])),
    }


def _constant(questions: Sequence[Question]) -> str:
    boxes = [question.box for question in questions if question.box is not None]
    if boxes:
        return box_text(np.median(np.array(boxes), axis=0).tolist())
    return Counter(question.answer for question in questions).most_common(1)[0][0]


def _by_kind(items: Iterable[Item]) -> dict[str, list[Item]]:
    kinds: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        kinds[item.kind].append(item)
    return dict(kinds)
