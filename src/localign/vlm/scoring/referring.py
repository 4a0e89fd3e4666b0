"""Benchmarks that ask where something is: an answer is right if its box overlaps the true one enough.

Scored ``declared``, boxes are read in the frame that the model declares and compared with the unrounded truth; what
lies on padding does not count. Scored ``published``, they must be literal lists in shares of the original image, and
are compared with a truth rounded to two decimals. Answers that name no box are wrong, and are counted either way.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from localign.errors import UserError
from localign.vlm.scoring.base import Answer, Benchmark, Question, Sample
from localign.vlm.scoring.boxes import (
    ORIGINAL,
    Box,
    BoxFrame,
    Size,
    iou,
    overlap,
    parse_box,
    parse_published,
    published_truth,
)
from localign.vlm.scoring.metrics import Ratio, Rows, Statistic, rows_by

ROUNDING = 1.0
"""Pixels by which a true box may reach over the border of its image, as sums of decimals do."""


class Referring(Benchmark):
    """A benchmark of boxes.

    Args:
        scoring: ``declared`` or ``published``; default the former.
        frame: The frame that answers must be in; default whichever each declares.
    """

    scorings = ("declared", "published")
    threshold: ClassVar[float]
    """Intersection over union from which a box is right."""

    def __init__(self, scoring: str | None = None, frame: BoxFrame | None = None) -> None:
        super().__init__(scoring)
        self.frame = frame

    @abstractmethod
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """The name of every figure, and the splits it is over."""

    def score_answer(self, question: Question, answer: Answer) -> Sample:
        frame = self._frame_of(answer)
        size = Size(*question.payload["size"])
        pixels = question.payload["box"]
        truth = Box.of_pixels(pixels, size)
        fault: str | None = None
        if self.scoring == "published":
            parsed = parse_published(answer.text, frame)
            shared = 0.0 if parsed is None else overlap(parsed, published_truth(pixels, size))
            fault = "no published box" if parsed is None else None
        else:
            found = parse_box(answer.text, frame, size)
            parsed, shared = None, 0.0
            if isinstance(found, Box):
                predicted = found.to(ORIGINAL).within_image()
                parsed, shared = predicted.corners, iou(predicted, truth)
            else:
                fault = found
        return {
            "score": float(shared >= self.threshold),
            "iou": shared,
            "parsed": None if parsed is None else list(parsed),
            "truth": list(truth.corners),
            "fault": fault,
            "frame": str(frame),
        }

    def statistics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        """Of every part, see :func:`box_figures`."""
        rows = rows_by(sample["split"] for sample in samples)
        parts = {
            part: np.concatenate([rows[split] for split in splits]) for part, splits in self.parts().items()
        }
        return box_figures(samples, parts)

    def _frame_of(self, answer: Answer) -> BoxFrame:
        if answer.frame is None:
            raise UserError(
                f"the model does not say which frame its boxes are in, so {self.name} cannot be scored; declare it, "
                f"for example {ORIGINAL}"
            )
        if self.frame is not None and answer.frame != self.frame:
            raise UserError(
                f"the answers are in the box frame {answer.frame}, not in {self.frame}; they are not scored as if "
                "they were"
            )
        return answer.frame


def box_figures(samples: Sequence[Sample], parts: Mapping[str, Rows]) -> dict[str, Statistic]:
    """For every part P the share of right answers, of answers without a box (``invalid__P``), and the mean
    intersection over union (``iou__P``, 0 for answers without a box).

    Args:
        samples: Of :class:`Referring`, where a part has them.
        parts: Names, and which samples each is over.
    """
    found: dict[str, Statistic] = {}
    for figure, value in _FIGURES.items():
        for part, chosen in parts.items():
            found[f"{figure}__{part}"] = Ratio([value(samples[row]) for row in chosen], rows=chosen)
    return found


_FIGURES: dict[str, Callable[[Sample], float]] = {
    "accuracy": lambda sample: float(sample["score"]),
    "invalid": lambda sample: float(sample["fault"] is not None),
    "iou": lambda sample: float(sample["iou"]),
}


def checked_box(
    corners: tuple[float, float, float, float], size: Size, where: object
) -> tuple[float, float, float, float]:
    """A true box in pixels, cut to its image where it reaches over the border by a rounding error.

    Raises:
        UserError: It is empty or lies outside the image; names ``where``.
    """
    x1, y1, x2, y2 = corners
    fits = (
        x1 >= -ROUNDING and y1 >= -ROUNDING and x2 <= size.width + ROUNDING and y2 <= size.height + ROUNDING
    )
    if not (fits and x1 < x2 and y1 < y2):
        raise UserError(
            f"{where}: the box {[x1, y1, x2, y2]} is none in an image of {size.width} x {size.height} pixels"
        )
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(size.width)), min(y2, float(size.height))
