"""The benchmark interface: questions read from official files, and the scores of answers to them.

A benchmark's own file says where its questions lie, what is asked, and which metrics are reported. This file has the
parts that all benchmarks share: the order of questions, subsets, checks of counts and images, scoring and averaging.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from localign.errors import RunFailure, UserError
from localign.files import is_inside
from localign.statistics.resampling import Statistic
from localign.text.printing import printable
from localign.text.reading import read_bytes
from localign.vlm.scoring.metrics import percent
from localign.vlm.scoring.questions import Answer, AnswerScore, Question, Sample

Counts = Mapping[str, tuple[int, ...]]
"""Number of questions by split; several numbers where editions of the files differ."""

ORDER_SEED = 21
"""Seed of the published order of questions."""

TOTAL = "all"
"""Key of all splits together in :data:`Counts`."""


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a benchmark, see :meth:`Benchmark.read`."""

    questions: list[Question]
    """In the published order."""
    limit: int | None = None
    """Maximum number of questions per split."""
    deviations: tuple[str, ...] = ()
    """Differences of the data from the official data, one line each; shown beside every metric."""
    allow_partial: bool = False
    """Whether the data may differ."""
    edition: str = ""
    """Digest of the files that hold the questions, see :func:`edition_of`."""


class Benchmark(ABC):
    """Questions, and the scores of answers to them.

    Metrics are in percent under their published names. The published values of TextVQA, POPE, TallyQA, VSR, AI2D,
    RefCOCO and OCID-Ref are shares of one.

    Args:
        scoring: One of :attr:`scorings`; default the first.

    Raises:
        UserError: The benchmark has no such scoring.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when questions, their order or their scores change, so that stored answers are not reused."""
    splits: ClassVar[tuple[str, ...]]
    expected: ClassVar[Counts]
    """Number of questions in the official files, by split or in ``TOTAL``."""
    expected_images: ClassVar[int | None] = None
    """Number of different images; None where it is not known."""
    headline: ClassVar[tuple[str, ...]]
    """The metrics that represent the benchmark in tables, if its questions define them."""
    scorings: ClassVar[tuple[str, ...]] = ("published",)

    def __init__(self, scoring: str | None = None) -> None:
        self.scoring = scoring or self.scorings[0]
        if self.scoring not in self.scorings:
            raise UserError(f"{self.name} is scored {' or '.join(self.scorings)}, not {scoring!r}")

    # -- what each benchmark defines ----------------------------------------------------------------------------

    @abstractmethod
    def files(self, root: Path) -> Sequence[Path]:
        """The files below the data root that hold the questions, in a fixed order."""

    @abstractmethod
    def questions(self, root: Path) -> Iterable[Question]:
        """All questions in the order of the files below the data root. Their images need not exist.

        Raises:
            UserError: A file is missing or malformed.
        """

    @abstractmethod
    def score_answer(self, question: Question, answer: Answer) -> AnswerScore:
        """The score, and everything else that :meth:`metrics` needs of the answer."""

    @abstractmethod
    def metrics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        """The metrics by their published names. The order of the samples does not matter."""

    def complete(self, questions: list[Question]) -> list[Question]:
        """The questions, with facts that only the image files hold. All images exist."""
        return questions

    # -- what all benchmarks share ------------------------------------------------------------------------------

    def read(
        self,
        root: str | os.PathLike[str],
        *,
        limit: int | None = None,
        allow_partial: bool = False,
        allow_outside: bool = False,
    ) -> QuestionSet:
        """Read the questions in the published order, and check their number and their images.

        Args:
            root: The data root; the official files are in its folder ``download``.
            limit: Maximum number of questions per split. A smaller subset is part of every larger one.
            allow_partial: Accept a number of questions that differs from the official one, leave out questions whose
                image is missing, and note both in the result.
            allow_outside: Accept image paths, absolute or with ``..``, that lead out of the data root.

        Raises:
            UserError: A file is missing or damaged, an id occurs twice, the data are partial without
                ``allow_partial``, or an image is outside the data root without ``allow_outside``.
        """
        if limit is not None and limit < 1:
            raise UserError(f"the limit of questions per split must be at least 1, not {limit}")
        with _garbage_collection_paused():
            found = list(self.questions(Path(root)))
        self._check_ids(found)
        if not allow_outside:
            self._check_inside(found, os.fspath(root))
        deviations = self._count_deviations(found)
        found = subset(published_order(found), limit)
        with_image, without = _split_by_image(found)
        if without:
            deviations.append(
                f"{len(without)} of {len(found)} questions are left out because their image is missing, for example "
                f"{without[0].image}"
            )
        self._check_complete(deviations, allow_partial)
        if not with_image:
            raise UserError(f"no question of {self.name} has its image below {root}")
        edition = edition_of(self.files(Path(root)))
        return QuestionSet(self.complete(with_image), limit, tuple(deviations), allow_partial, edition)

    def without_unreadable(self, data: QuestionSet, unreadable: Collection[str]) -> QuestionSet:
        """The questions whose image could be decoded.

        Args:
            data: As read.
            unreadable: Ids of the questions with such an image.

        Raises:
            UserError: There are such questions and the data may not be partial, or no question is left.
        """
        lost = [question for question in data.questions if question.id in unreadable]
        if not lost:
            return data
        note = (
            f"{len(lost)} of {len(data.questions)} questions are left out because their image cannot be read, for "
            f"example {lost[0].image}"
        )
        self._check_complete([note], data.allow_partial)
        if len(lost) == len(data.questions):
            raise UserError(
                f"no question of {self.name} has an image that can be read, for example {lost[0].image}"
            )
        remaining = [question for question in data.questions if question.id not in unreadable]
        return replace(data, questions=remaining, deviations=(*data.deviations, note))

    def score(self, question: Question, answer: Answer) -> Sample:
        """Score one answer.

        Raises:
            UserError: The answer's box frame is missing, or not the frame that is scored.
            RunFailure: An answer to choices does not have one probability per choice.
        """
        if question.choices:
            _check_probabilities(question, answer)
        scored = self.score_answer(question, answer)
        return {"id": question.id, "image": question.image, "split": question.split, **scored}

    def aggregate(self, samples: Sequence[Sample]) -> dict[str, float | None]:
        """All metrics by name, in percent; None where the samples do not define a metric."""
        return {name: percent(metric.value()) for name, metric in self.metrics(samples).items()}

    def _check_complete(self, deviations: Sequence[str], allow_partial: bool) -> None:
        if deviations and not allow_partial:
            raise UserError(
                f"the data of {self.name} are not complete: {'; '.join(deviations)} (--allow-partial accepts this)"
            )

    def _check_ids(self, questions: Sequence[Question]) -> None:
        if len({question.id for question in questions}) < len(questions):
            duplicate, _ = Counter(question.id for question in questions).most_common(1)[0]
            raise UserError(f"the files of {self.name} hold the question {duplicate} more than once")

    def _check_inside(self, questions: Sequence[Question], root: str) -> None:
        here, start = os.getcwd(), os.path.join(root, "")
        for image in {question.image for question in questions}:
            rest = image.removeprefix(start)
            unsafe = ".." in rest or os.path.isabs(rest)
            if unsafe and not is_inside(os.path.join(here, start, rest), root):
                raise UserError(
                    f"the files of {self.name} name the image {printable(image)}, which is outside the data root "
                    f"{printable(root)} (--allow-outside accepts this)"
                )

    def _count_deviations(self, questions: Sequence[Question]) -> list[str]:
        counts = Counter(question.split for question in questions)
        counts[TOTAL] = len(questions)
        found = [
            f"{counts[split]} questions in {split!r} instead of {' or '.join(map(str, numbers))}"
            for split, numbers in self.expected.items()
            if counts[split] not in numbers
        ]
        images = len({question.image for question in questions})
        if self.expected_images is not None and images != self.expected_images and not found:
            found.append(f"questions on {images} images instead of {self.expected_images}")
        return found


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Reading makes millions of objects and no garbage; looking for garbage would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def edition_of(files: Iterable[Path]) -> str:
    """The edition of a benchmark's question files: the first 16 digits of the SHA-256 of all files, one after another.

    ``cat FILE ... | sha256sum`` gives the same digits.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(read_bytes(path))
    return digest.hexdigest()[:16]


def published_order(questions: Sequence[Question]) -> list[Question]:
    """The questions, shuffled as published: a function of their number alone."""
    order = list(questions)
    random.Random(ORDER_SEED).shuffle(order)
    return order


def subset(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The first ``limit`` questions of every split, in order; all questions for None."""
    if limit is None:
        return list(questions)
    taken: Counter[str] = Counter()
    chosen = []
    for question in questions:
        if taken[question.split] < limit:
            taken[question.split] += 1
            chosen.append(question)
    return chosen


def _split_by_image(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """The questions whose image exists, and the others."""
    exists = {image: os.path.isfile(image) for image in {question.image for question in questions}}
    with_image = [question for question in questions if exists[question.image]]
    return with_image, [question for question in questions if not exists[question.image]]


def _check_probabilities(question: Question, answer: Answer) -> None:
    values = answer.probabilities
    if len(values) != len(question.choices):
        raise RunFailure(
            f"question {question.id} has {len(question.choices)} choices, but the model gave {len(values)} "
            "probabilities"
        )
    # "not >=" rather than "<", because every comparison with NaN is false.
    if not all(value >= 0 for value in values) or not 0 < sum(values) < float("inf"):
        raise RunFailure(f"the model's probabilities for question {question.id} are invalid: {values}")
