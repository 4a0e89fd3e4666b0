"""What a benchmark is: questions read from its official files, and the scores of answers to them.

A benchmark's own file says where its questions lie, what is asked, and which figures are reported. Here is what
all share: the order of questions and subsets of it, the checks of counts and images, scoring and averaging.
"""

from __future__ import annotations

import gc
import os
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from localign.errors import RunFailure, UserError
from localign.vlm.scoring.boxes import BoxFrame
from localign.vlm.scoring.metrics import Statistic, percent

Mode = Literal["text", "choices"]
Sample = dict[str, Any]
"""One scored answer, JSON-able: ``id``, ``image``, ``split``, ``score`` in 0..1, ``parsed`` (the answer as it was
understood), ``truth``, and what else the benchmark's figures need."""

Counts = Mapping[str, tuple[int, ...]]
"""Numbers of questions by split; several where editions of the files differ."""

ORDER_SEED = 21
"""Of the published order of questions."""

TOTAL = "all"
"""Stands for all splits together where counts are given by split."""

MAX_NEW_TOKENS = 128
"""Of an answer in words, decoded greedily."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question on one image."""

    id: str
    """Unique in its benchmark, and the same whenever and wherever the files are read."""
    image: str
    """Path of the image; it exists."""
    message: str
    """What is asked, to be put into a prompt format."""
    split: str
    """The part of the benchmark that has figures of its own."""
    payload: Mapping[str, Any]
    """What the score needs, JSON-able; the truth among it."""
    choices: tuple[str, ...] = ()
    """The strings whose probabilities are compared; empty where the answer is text."""

    @property
    def mode(self) -> Mode:
        """``text``: greedy decoding. ``choices``: the probabilities of the first token."""
        return "choices" if self.choices else "text"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to a question."""

    text: str = ""
    """In mode ``text``: decoded, without special tokens."""
    probabilities: tuple[float, ...] = ()
    """In mode ``choices``: one per choice."""
    frame: BoxFrame | None = None
    """What coordinates in the text refer to; None for a model that declares nothing."""


@dataclass(frozen=True)
class QuestionSet:
    """What :meth:`Benchmark.read` gives."""

    questions: list[Question]
    """In the published order."""
    limit: int | None = None
    """Questions of each split, at most."""
    missing: tuple[str, ...] = field(default=())
    """In what the data fall short of the official ones, a line each; belongs beside every figure."""
    allow_partial: bool = False
    """Whether they may."""


class Benchmark(ABC):
    """Questions, and the scores of answers to them.

    Figures are in percent throughout, under the published names; published figures of TextVQA, POPE, TallyQA, VSR,
    AI2D, RefCOCO and OCID-Ref are shares of one.

    Args:
        scoring: One of :attr:`scorings`; default the first.

    Raises:
        UserError: There is no such scoring.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when questions, their order or their scores change, so that no stored result is taken for a new one."""
    splits: ClassVar[tuple[str, ...]]
    expected: ClassVar[Counts]
    """How many questions the official files hold, by split or in ``TOTAL``."""
    expected_images: ClassVar[int | None] = None
    """How many different images the questions are on, where that is known."""
    headline: ClassVar[tuple[str, ...]]
    """The figures that stand for the benchmark in tables, where its questions have them."""
    scorings: ClassVar[tuple[str, ...]] = ("published",)

    def __init__(self, scoring: str | None = None) -> None:
        self.scoring = scoring or self.scorings[0]
        if self.scoring not in self.scorings:
            raise UserError(f"{self.name} is scored {' or '.join(self.scorings)}, not {scoring!r}")

    # -- what is a benchmark's own ------------------------------------------------------------------------------

    @abstractmethod
    def questions(self, root: Path) -> Iterable[Question]:
        """All questions, in the order of the files below the data root; images need not exist.

        Raises:
            UserError: A file is missing or not as it should be.
        """

    @abstractmethod
    def score_answer(self, question: Question, answer: Answer) -> Sample:
        """``score``, ``parsed``, ``truth`` and what :meth:`statistics` needs."""

    @abstractmethod
    def statistics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        """The figures by their published names, of samples in any order."""

    def complete(self, questions: list[Question]) -> list[Question]:
        """The questions with what is known only from their images' files, once these are known to be there."""
        return questions

    # -- what is common -----------------------------------------------------------------------------------------

    def read(
        self, root: str | os.PathLike[str], *, limit: int | None = None, allow_partial: bool = False
    ) -> QuestionSet:
        """The questions, in the published order, once counts and images are checked.

        Args:
            root: The data root; official files are in ``download`` there.
            limit: Questions of each split, at most; a smaller subset is part of every larger one.
            allow_partial: Go on with fewer or more questions than the official files hold, and without those whose
                image is missing, and say so in the result.

        Raises:
            UserError: A file is missing or damaged, an id comes twice, or data are partial and may not be.
        """
        if limit is not None and limit < 1:
            raise UserError(f"a limit is a number of questions per split, at least 1; {limit} is none")
        with _no_collection():
            found = list(self.questions(Path(root)))
        self._check_ids(found)
        missing = self._count_differences(found)
        found = subset(published_order(found), limit)
        there, absent = _with_images(found)
        if absent:
            missing.append(
                f"{len(absent)} of {len(found)} questions are left out because their image is missing, for example "
                f"{absent[0].image}"
            )
        self._check_whole(missing, allow_partial)
        if not there:
            raise UserError(f"there is not one question of {self.name} whose image is there, below {root}")
        return QuestionSet(self.complete(there), limit, tuple(missing), allow_partial)

    def readable(self, data: QuestionSet, unreadable: Collection[str]) -> QuestionSet:
        """The questions without those whose image turned out to be damaged when it was opened.

        Args:
            data: As read.
            unreadable: Ids of these questions.

        Raises:
            UserError: There are some and data may not be partial, or no question is left.
        """
        lost = [question for question in data.questions if question.id in unreadable]
        if not lost:
            return data
        note = (
            f"{len(lost)} of {len(data.questions)} questions are left out because their image cannot be read, for "
            f"example {lost[0].image}"
        )
        self._check_whole([note], data.allow_partial)
        if len(lost) == len(data.questions):
            raise UserError(
                f"there is not one question of {self.name} whose image can be read, for example {lost[0].image}"
            )
        kept = [question for question in data.questions if question.id not in unreadable]
        return replace(data, questions=kept, missing=(*data.missing, note))

    def score(self, question: Question, answer: Answer) -> Sample:
        """The score of one answer, with all that :meth:`aggregate` needs.

        Raises:
            UserError: The answer's box frame is missing or not the one that is scored.
            RunFailure: An answer to choices is no list of probabilities, one per choice.
        """
        if question.choices:
            _check_probabilities(question, answer)
        common = {"id": question.id, "image": question.image, "split": question.split}
        return common | self.score_answer(question, answer)

    def aggregate(self, samples: Sequence[Sample]) -> dict[str, float | None]:
        """All figures by name, in percent; None where one is not defined on these samples."""
        return {name: percent(statistic.value()) for name, statistic in self.statistics(samples).items()}

    def _check_whole(self, missing: Sequence[str], allow_partial: bool) -> None:
        if missing and not allow_partial:
            raise UserError(
                f"the data of {self.name} are not whole: {'; '.join(missing)} (--allow-partial goes on regardless)"
            )

    def _check_ids(self, questions: Sequence[Question]) -> None:
        if len({question.id for question in questions}) < len(questions):
            twice, _ = Counter(question.id for question in questions).most_common(1)[0]
            raise UserError(f"the files of {self.name} hold the question {twice} more than once")

    def _count_differences(self, questions: Sequence[Question]) -> list[str]:
        counts = Counter(question.split for question in questions)
        counts[TOTAL] = len(questions)
        differences = [
            f"{counts[split]} questions in {split!r} where there are {' or '.join(map(str, numbers))}"
            for split, numbers in self.expected.items()
            if counts[split] not in numbers
        ]
        images = len({question.image for question in questions})
        if self.expected_images is not None and images != self.expected_images and not differences:
            differences.append(f"questions on {images} images where there are {self.expected_images}")
        return differences


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing that is read is garbage, and to walk millions of new objects for it takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def published_order(questions: Sequence[Question]) -> list[Question]:
    """The questions shuffled as they were published: a function of their number alone."""
    order = list(questions)
    random.Random(ORDER_SEED).shuffle(order)
    return order


def subset(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The first ``limit`` questions of every split, in order; all where it is None."""
    if limit is None:
        return list(questions)
    taken: Counter[str] = Counter()
    chosen = []
    for question in questions:
        if taken[question.split] < limit:
            taken[question.split] += 1
            chosen.append(question)
    return chosen


def _with_images(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """The questions whose image is there, and those whose image is not."""
    exists = {image: os.path.isfile(image) for image in {question.image for question in questions}}
    there = [question for question in questions if exists[question.image]]
    return there, [question for question in questions if not exists[question.image]]


def _check_probabilities(question: Question, answer: Answer) -> None:
    values = answer.probabilities
    if len(values) != len(question.choices):
        raise RunFailure(
            f"question {question.id} has {len(question.choices)} choices, but the model gave {len(values)} "
            "probabilities"
        )
    # "not >=" rather than "<": NaN is neither.
    if not all(value >= 0 for value in values) or not 0 < sum(values) < float("inf"):
        raise RunFailure(
            f"the model's probabilities for question {question.id} are no probabilities: {values}"
        )
