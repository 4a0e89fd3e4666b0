"""GQA, balanced test-dev: compositional questions with one right answer each."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from localign.errors import UserError
from localign.statistics.resampling import Statistic
from localign.text.reading import read_json
from localign.vlm.scoring.base import TOTAL, Benchmark, Counts
from localign.vlm.scoring.messages import short_answer
from localign.vlm.scoring.metrics import Ratio
from localign.vlm.scoring.normalisation import strict
from localign.vlm.scoring.open_ended import scores_of
from localign.vlm.scoring.questions import Answer, AnswerScore, Question, Sample
from localign.vlm.scoring.readers import field

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class GQA(Benchmark):
    """``download/gqa``: ``testdev_balanced_questions.json`` and ``images``. Published in percent.

    Scoring ``published`` lowers the prediction, deletes its punctuation, and compares it with the right answer as it
    is. Scoring ``strict`` normalises both alike.
    """

    name = "gqa"
    splits = ("testdev",)
    expected: ClassVar[Counts] = {TOTAL: (12578,)}
    expected_images = 398
    headline = ("accuracy",)
    scorings = ("published", "strict")

    def files(self, root: Path) -> tuple[Path, ...]:
        return (root / "download" / "gqa" / "testdev_balanced_questions.json",)

    def questions(self, root: Path) -> Iterator[Question]:
        (path,) = self.files(root)
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} is not an object from ids to questions")
        for name, record in content.items():
            where = f"{path}, question {name}"
            yield Question(
                id=name,
                image=str(path.parent / "images" / f"{field(record, 'imageId', str, where)}.jpg"),
                message=short_answer(field(record, "question", str, where)),
                split="testdev",
                payload={
                    "answer": field(record, "answer", str, where),
                    "balanced": field(record, "isBalanced", bool, where),
                },
            )

    def score_answer(self, question: Question, answer: Answer) -> AnswerScore:
        truth = question.payload["answer"]
        if self.scoring == "strict":
            parsed = strict(answer.text)
            right = parsed == strict(truth)
        else:
            parsed = answer.text.translate(_NO_PUNCTUATION).lower()
            right = parsed == truth
        return {
            "score": float(right),
            "parsed": parsed,
            "truth": truth,
            "balanced": question.payload["balanced"],
        }

    def metrics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        rows = np.flatnonzero([sample["balanced"] for sample in samples])
        return {"accuracy": Ratio(scores_of(samples)[rows], rows=rows)}
