"""VizWiz, validation: questions that blind people asked of their photographs, some of which have no answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from localign.vlm.scoring.base import TOTAL, Answer, Counts, Question, Sample
from localign.vlm.scoring.messages import short_answer_or_none
from localign.vlm.scoring.metrics import AveragePrecision, Ratio, Statistic
from localign.vlm.scoring.normalisation import VIZWIZ
from localign.vlm.scoring.open_ended import OpenEnded, scores_of
from localign.vlm.scoring.readers import field, read_json, records, strings

UNANSWERABLE = "unanswerable"


class VizWiz(OpenEnded):
    """``download/vizwiz``: ``val.json`` and ``val_images``. Published rounded to two decimals, in percent.

    Whether a question can be answered is a prediction too: positive are the questions that cannot, and a question is
    predicted positive if the answer, normalised, is "unanswerable". Average precision is of these hard predictions.
    """

    name = "vizwiz"
    splits = ("val",)
    expected: ClassVar[Counts] = {TOTAL: (4319,)}
    expected_images = 4319
    headline = ("accuracy__VizWiz-Overall",)
    evaluator = VIZWIZ

    def questions(self, root: Path) -> Iterator[Question]:
        folder = root / "download" / "vizwiz"
        path = folder / "val.json"
        for number, record in enumerate(records(read_json(path), path)):
            where = f"{path}, record {number}"
            given = [field(answer, "answer", str, where) for answer in field(record, "answers", list, where)]
            yield Question(
                id=str(number),
                image=str(folder / "val_images" / field(record, "image", str, where)),
                message=short_answer_or_none(field(record, "question", str, where)),
                split="val",
                payload={
                    "answers": strings(given, "answers", where),
                    "answerable": bool(field(record, "answerable", int, where)),
                },
            )

    def score_answer(self, question: Question, answer: Answer) -> Sample:
        return super().score_answer(question, answer) | {"answerable": question.payload["answerable"]}

    def statistics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
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
