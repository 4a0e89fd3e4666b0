"""Benchmarks whose answers are compared by the probability of their first token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localign.vlm.scoring.base import Answer, Benchmark, Question, Sample
from localign.vlm.scoring.metrics import (
    Auroc,
    AveragePrecision,
    Ratio,
    Rows,
    Statistic,
    macro_average_precision,
    one_vs_one_auroc,
    rows_by,
)


class MultipleChoice(Benchmark):
    """A benchmark of choices; the payload's ``label`` is the position of the right one."""

    def score_answer(self, question: Question, answer: Answer) -> Sample:
        """The likeliest choice counts; among equally likely ones, the first."""
        probabilities = np.asarray(answer.probabilities, dtype=np.float64)
        probabilities /= probabilities.sum()
        chosen, label = int(probabilities.argmax()), question.payload["label"]
        return {
            "score": float(chosen == label),
            "parsed": question.choices[chosen],
            "truth": question.choices[label],
            "label": label,
            "probabilities": probabilities.tolist(),
        }


def columns(samples: Sequence[Sample]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Scores ``(n,)``, probabilities ``(n, choices)`` and labels ``(n,)``."""
    scores = np.asarray([sample["score"] for sample in samples], dtype=np.float64)
    probabilities = np.asarray([sample["probabilities"] for sample in samples], dtype=np.float64)
    return scores, probabilities, np.asarray([sample["label"] for sample in samples], dtype=np.int64)


def multiple_choice_figures(
    samples: Sequence[Sample], name: str, splits: Sequence[str]
) -> dict[str, Statistic]:
    """Accuracy and areas under curves of each split and, as ``final``, of all questions together.

    The area under the ROC curve is the mean over pairs of classes, average precision that over classes; classes
    that do not occur are left out.
    """
    scores, probabilities, labels = columns(samples)
    rows = rows_by(sample["split"] for sample in samples)
    parts: dict[str, Rows] = {split: rows[split] for split in splits} | {"final": np.arange(len(scores))}
    found: dict[str, Statistic] = {}
    for part, chosen in parts.items():
        own = probabilities[chosen], labels[chosen], chosen
        found[f"accuracy__{name}-{part}-Accuracy"] = Ratio(scores[chosen], rows=chosen)
        found[f"accuracy__{name}-{part}-AUCROC"] = one_vs_one_auroc(*own)
        found[f"accuracy__{name}-{part}-AUCPR"] = macro_average_precision(*own)
    return found


def binary_curves(
    prefix: str, positive: NDArray[np.float64], labels: NDArray[np.bool_], rows: Rows
) -> dict[str, Statistic]:
    """Areas under the ROC and the precision-recall curve of the probability of the positive choice."""
    return {
        f"{prefix}-AUCROC": Auroc(positive[rows], labels[rows], rows),
        f"{prefix}-AUCPR": AveragePrecision(positive[rows], labels[rows], rows),
    }
