"""Questions, answers and scored answers: the types that benchmarks, models and result files share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from localign.vlm.scoring.boxes import BoxFrame

Mode = Literal["text", "choices"]

MAX_NEW_TOKENS = 128
"""Longest answer in words; decoding is greedy."""


class Payload(TypedDict, total=False):
    """The facts that the score of an answer needs, JSON-able. Each benchmark has some of the keys."""

    label: int
    """Index of the right choice."""
    relation: str
    """VSR: the spatial relation of the statement."""
    answer: str
    """The right answer."""
    answers: Sequence[str]
    """One per annotator."""
    answerable: bool
    """VizWiz: whether the image shows the answer."""
    answer_type: str
    """VQAv2: yes/no, number or other."""
    question_type: str
    """VQAv2: the question's first words."""
    balanced: bool
    """GQA: whether the question is in the balanced set."""
    box: Sequence[float]
    """The true box in pixels of the original image: left, top, right, bottom."""
    size: Sequence[int]
    """Width and height of the original image, pixels."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question on one image."""

    id: str
    """Unique within the benchmark; the same on every machine."""
    image: str
    """Path of the image, which exists."""
    message: str
    """The question and its instruction, without the prompt format's words."""
    split: str
    """The part of the benchmark that the question counts for."""
    payload: Payload
    choices: tuple[str, ...] = ()
    """The strings whose probabilities are compared; empty for an answer in words."""

    @property
    def mode(self) -> Mode:
        """``text``: greedy decoding. ``choices``: the probabilities of the first token."""
        return "choices" if self.choices else "text"


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer to one question."""

    text: str = ""
    """In mode ``text``: decoded, without special tokens."""
    probabilities: tuple[float, ...] = ()
    """In mode ``choices``: one per choice."""
    frame: BoxFrame | None = None
    """The frame of coordinates in the text; None for a model that does not declare one."""


class _AnswerScore(TypedDict):
    score: float
    """0..1."""
    parsed: str | list[float] | None
    """The answer as the benchmark understood it: words, a choice, or a box; None for an answer without a box."""
    truth: str | Sequence[str] | list[float]


class AnswerScore(_AnswerScore, total=False):
    """The score of one answer, JSON-able. Each benchmark has some of the further keys."""

    label: int
    """Index of the right choice."""
    probabilities: list[float]
    """Probabilities of the choices; their sum is 1."""
    answerable: bool
    answer_type: str
    question_type: str
    balanced: bool
    iou: float
    """Intersection over union with the true box; 0 for an answer without a box."""
    fault: str | None
    """Why the answer names no box; None for an answer that names one."""
    frame: str | None
    """The box frame of the answer."""


class Sample(AnswerScore):
    """One scored answer, with the identity of its question."""

    id: str
    image: str
    split: str
