"""Benchmarks with several annotators' answers: a word or phrase is right as far as they agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from localign.vlm.scoring.base import Answer, Benchmark, Question, Sample
from localign.vlm.scoring.normalisation import STRICT, Evaluator, soft_score


class OpenEnded(Benchmark):
    """A benchmark of annotators' answers, the payload's ``answers``.

    Scored ``published``, predictions and annotators' answers are normalised as its evaluator does; scored ``strict``,
    both go through one normaliser.
    """

    scorings = ("published", "strict")
    evaluator: ClassVar[Evaluator]

    def score_answer(self, question: Question, answer: Answer) -> Sample:
        rules = self.evaluator if self.scoring == "published" else STRICT
        parsed = rules.prediction(answer.text)
        truth = question.payload["answers"]
        score = soft_score(parsed, [rules.truth(given) for given in truth])
        return {"score": score, "parsed": parsed, "truth": truth}


def scores_of(samples: Sequence[Sample]) -> NDArray[np.float64]:
    """float64 ``(n,)``."""
    return np.asarray([sample["score"] for sample in samples], dtype=np.float64)
