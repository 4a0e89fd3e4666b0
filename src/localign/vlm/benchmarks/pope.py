"""POPE: whether an object is in the picture, for objects that models tend to hallucinate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from localign.errors import UserError
from localign.statistics.resampling import Rows, Statistic
from localign.vlm.scoring.base import Counts
from localign.vlm.scoring.messages import short_answer
from localign.vlm.scoring.metrics import Mean, Ratio, rows_by
from localign.vlm.scoring.multiple_choice import MultipleChoice, binary_curves, columns
from localign.vlm.scoring.questions import Question, Sample
from localign.vlm.scoring.readers import field, records_of

CHOICES = ("Yes", "No")


class POPE(MultipleChoice):
    """``download/pope``: ``coco_pope_*.json`` and ``val_images``. "Yes" is the positive class.

    The published final accuracy is the mean of the three splits' accuracies. The other final metrics are over all
    questions, and so is ``accuracy__POPE-pooled-Accuracy``. Precision, recall, F1 and the share of "Yes" are additions
    to the published metrics.
    """

    name = "pope"
    splits = ("adversarial", "popular", "random")
    expected: ClassVar[Counts] = {"adversarial": (3000,), "popular": (3000,), "random": (2910, 3000)}
    headline = ("accuracy__POPE-final-Accuracy",)

    def files(self, root: Path) -> tuple[Path, ...]:
        folder = root / "download" / "pope"
        return tuple(folder / f"coco_pope_{split}.json" for split in self.splits)

    def questions(self, root: Path) -> Iterator[Question]:
        for split, path in zip(self.splits, self.files(root), strict=True):
            for number, record in enumerate(records_of(path)):
                where = f"{path}, record {number}"
                label = field(record, "label", str, where).strip().lower()
                if label not in ("yes", "no"):
                    raise UserError(f"{where}: the label must be yes or no, not {label!r}")
                yield Question(
                    id=f"{split}-{field(record, 'question_id', int, where)}",
                    image=str(path.parent / "val_images" / field(record, "image", str, where)),
                    message=short_answer(field(record, "text", str, where)),
                    split=split,
                    payload={"label": ("yes", "no").index(label)},
                    choices=CHOICES,
                )

    def metrics(self, samples: Sequence[Sample]) -> dict[str, Statistic]:
        scores, probabilities, labels = columns(samples)
        truth = labels == 0
        predicted = np.asarray([sample["parsed"] == "Yes" for sample in samples])
        rows = rows_by(sample["split"] for sample in samples)
        parts: dict[str, Rows] = {split: rows[split] for split in self.splits}
        accuracies: dict[str, Statistic] = {
            part: Ratio(scores[chosen], rows=chosen) for part, chosen in parts.items()
        }
        accuracies |= {"final": Mean(list(accuracies.values())), "pooled": Ratio(scores)}
        found = {f"accuracy__POPE-{part}-Accuracy": accuracy for part, accuracy in accuracies.items()}
        for part, chosen in (parts | {"final": np.arange(len(scores))}).items():
            found |= binary_curves(f"accuracy__POPE-{part}", probabilities[:, 0], truth, chosen)
            found |= _hard_metrics(f"POPE-{part}", truth, predicted, chosen)
        return found


def _hard_metrics(
    prefix: str, truth: NDArray[np.bool_], predicted: NDArray[np.bool_], rows: Rows
) -> dict[str, Statistic]:
    """Metrics of the choices themselves, without their probabilities."""
    positive, yes = truth[rows].astype(float), predicted[rows].astype(float)
    hit = positive * yes
    return {
        f"{prefix}-Precision": Ratio(hit, yes, rows),
        f"{prefix}-Recall": Ratio(hit, positive, rows),
        f"{prefix}-F1": Ratio(2 * hit, yes + positive, rows),
        f"{prefix}-YesShare": Ratio(yes, rows=rows),
    }
