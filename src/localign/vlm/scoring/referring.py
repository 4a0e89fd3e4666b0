"""Referring expressions: an answer is right if its box overlaps the true box enough.

Scoring ``declared`` reads boxes in the frame that the model declares, cuts off padding, and compares with the exact
truth. Scoring ``published`` accepts only literal lists in shares of the original image, and compares with a truth
rounded to two decimals. With both, an answer without a box is wrong, and such answers are counted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from localign.errors import UserError
from localign.statistics.resampling import Rows, Statistic
from localign.vlm.scoring.base import Benchmark
from localign.vlm.scoring.boxes import (
    ORIGINAL,
    Box,
    BoxFrame,
    Corners,
    Size,
    iou,
    overlap,
    parse_box,
    parse_published,
    published_truth,
)
from localign.vlm.scoring.metrics import Ratio, rows_by
from localign.vlm.scoring.questions import Answer, AnswerScore, Question, Sample

ROUNDING = 1.0
"""Pixels by which a true box may exceed its image through rounding."""


class Referring(Benchmark):
    """A benchmark of boxes.

    Args:
        scoring: ``declared`` or ``published``; default ``declared``.
        frame: The frame that all answers must be in; default the frame that each answer declares.
    """

    scorings = ("declared", "published")
    threshold: ClassVar[float]
    """Lowest intersection over union of a right box."""

    def __init__(self, scoring: str | None = None, frame: BoxFrame | None = None) -> None:
        super().__init__(scoring)
        self.frame = frame

    @abstractmethod
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """By name in the metrics, the splits that a part consists of."""

    def score_answer(self, question: Question, answer: Answer) -> AnswerScore:
        frame = self._frame_of(answer)
        size = Size(*question.payload["size"])
        pixels = question.payload["box"]
        truth = Box.of_pixels(pixels, size)
        parsed: Corners | None = None
        common, fault = 0.0, None
        if self.scoring == "published":
            parsed = parse_published(answer.text, frame)
            if parsed is None:
                fault = "no published box"
            else:
                common = overlap(parsed, published_truth(pixels, size))
        else:
            found = parse_box(answer.text, frame, size)
            if isinstance(found, Box):
                predicted = found.to(ORIGINAL).within_image()
                parsed, common = predicted.corners, iou(predicted, truth)
            else:
                fault = found
        return {
            "score": float(common >= self.threshold),
            "iou": common,
            "parsed": None if parsed is None else list(parsed),
            "truth": list(truth.corners),
            "fault": fault,
            "frame": str(frame),
        }

    def metrics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        """The metrics of every part, see :func:`box_metrics`."""
        rows = rows_by(sample["split"] for sample in samples)
        parts = {
            part: np.concatenate([rows[split] for split in splits]) for part, splits in self.parts().items()
        }
        return box_metrics(samples, parts)

    def _frame_of(self, answer: Answer) -> BoxFrame:
        if answer.frame is None:
            raise UserError(
                f"the model does not declare the frame of its boxes, so {self.name} cannot be scored; give --boxes, "
                f"for example --boxes {ORIGINAL}"
            )
        if self.frame is not None and answer.frame != self.frame:
            raise UserError(
                f"the answers are in the box frame {answer.frame}, but only answers in {self.frame} are scored"
            )
        return answer.frame


def box_metrics(samples: Sequence[Sample], parts: Mapping[str, Rows]) -> dict[str, Statistic]:
    """Three metrics for each part P.

    ``accuracy__P`` is the share of right answers, ``invalid__P`` the share of answers without a box, and ``iou__P``
    the mean intersection over union, with 0 for answers without a box.

    Args:
        samples: Samples of any benchmark; those in the parts are of :class:`Referring`.
        parts: Indices of the samples in each part.
    """
    found: dict[str, Statistic] = {}
    for metric, value in _METRICS.items():
        for part, chosen in parts.items():
            found[f"{metric}__{part}"] = Ratio([value(samples[row]) for row in chosen], rows=chosen)
    return found


_METRICS: dict[str, Callable[[Sample], float]] = {
    "accuracy": lambda sample: float(sample["score"]),
    "invalid": lambda sample: float(sample["fault"] is not None),
    "iou": lambda sample: float(sample["iou"]),
}


def checked_box(corners: Sequence[float], size: Size, where: object) -> Corners:
    """Check a true box in pixels, and clip what exceeds the image by a rounding error.

    Raises:
        UserError: The box is empty or lies outside the image; the line names ``where``.
    """
    x1, y1, x2, y2 = corners
    fits = (
        x1 >= -ROUNDING and y1 >= -ROUNDING and x2 <= size.width + ROUNDING and y2 <= size.height + ROUNDING
    )
    if not (fits and x1 < x2 and y1 < y2):
        raise UserError(
            f"{where}: the box {[x1, y1, x2, y2]} does not fit in an image of {size.width} x {size.height} pixels"
        )
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(size.width)), min(y2, float(size.height))
