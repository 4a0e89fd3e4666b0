"""VizWiz, validation: questions of blind people about their photographs; some cannot be answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from localign.statistics.resampling import Statistic
from localign.text.reading import read_json
from localign.vlm.scoring.base import TOTAL, Counts
from localign.vlm.scoring.messages import short_answer_or_none
from localign.vlm.scoring.metrics import AveragePrecision, Ratio
from localign.vlm.scoring.normalisation import VIZWIZ
from localign.vlm.scoring.open_ended import OpenEnded, scores_of
from localign.vlm.scoring.questions import Answer, AnswerScore, Question, Sample
from localign.vlm.scoring.readers import as_list, field, strings, zero_or_one

UNANSWERABLE = "unanswerable"


class VizWiz(OpenEnded):
    """``download/vizwiz``: ``val.json`` and ``val_images``. Published in percent, rounded to two decimals.

    Two metrics treat unanswerable questions as the positive class: the normalised answer "unanswerable" predicts it.
    Average precision is over these hard predictions.
    """

    name = "vizwiz"
    splits = ("val",)
    expected: ClassVar[Counts] = {TOTAL: (4319,)}
    expected_images = 4319
    headline = ("accuracy__VizWiz-Overall",)
    evaluator = VIZWIZ

    def files(self, root: Path) -> tuple[Path, ...]:
        return (root / "download" / "vizwiz" / "val.json",)

    def questions(self, root: Path) -> Iterator[Question]:
        (path,) = self.files(root)
        for number, record in enumerate(as_list(read_json(path), path)):
            where = f"{path}, record {number}"
            given = [field(answer, "answer", str, where) for answer in field(record, "answers", list, where)]
            yield Question(
                id=str(number),
                image=str(path.parent / "val_images" / field(record, "image", str, where)),
                message=short_answer_or_none(field(record, "question", str, where)),
                split="val",
                payload={
                    "answers": strings(given, "answers", where),
                    "answerable": bool(zero_or_one(record, "answerable", where)),
                },
            )

    def score_answer(self, question: Question, answer: Answer) -> AnswerScore:
        return {**super().score_answer(question, answer), "answerable": question.payload["answerable"]}

    def metrics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        scores = scores_of(samples)
        answerable = np.asarray([sample["answerable"] for sample in samples], dtype=bool)
        positive = (~answerable).astype(float)
        predicted = np.asarray([sample["parsed"] == UNANSWERABLE for sample in samples], dtype=float)
        can, cannot = np.flatnonzero(answerable), np.flatnonzero(~answerable)
        prefix = "accuracy__VizWiz"
        return {
            f"{prefix}-Overall": Ratio(scores),
            f"{prefix}-Answerable": Ratio(scores[can], rows=can),
            f"{prefix}-Unanswerable": Ratio(scores[cannot], rows=cannot),
            f"{prefix}-Unanswerable-AvgPR": AveragePrecision(predicted, ~answerable),
            f"{prefix}-Unanswerable-F1": Ratio(2 * positive * predicted, positive + predicted),
        }
