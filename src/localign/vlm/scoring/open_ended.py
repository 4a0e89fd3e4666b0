"""Open-ended questions with several annotators' answers: the score is the agreement with the annotators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from localign.vlm.scoring.base import Benchmark
from localign.vlm.scoring.normalisation import STRICT, Evaluator, soft_score
from localign.vlm.scoring.questions import Answer, AnswerScore, Question, Sample


class OpenEnded(Benchmark):
    """A benchmark of answers in words. The payload's ``answers`` are the annotators' answers.

    Scoring ``published`` normalises predictions and annotators' answers as the published evaluator does; ``strict``
    normalises both alike.
    """

    scorings = ("published", "strict")
    evaluator: ClassVar[Evaluator]

    def score_answer(self, question: Question, answer: Answer) -> AnswerScore:
        rules = self.evaluator if self.scoring == "published" else STRICT
        parsed = rules.prediction(answer.text)
        truth = question.payload["answers"]
        score = soft_score(parsed, [rules.truth(given) for given in truth])
        return {"score": score, "parsed": parsed, "truth": truth}


def scores_of(samples: Sequence[Sample]) -> NDArray[np.float64]:
    """The scores, float64 ``(n,)``."""
    return np.asarray([sample["score"] for sample in samples], dtype=np.float64)
