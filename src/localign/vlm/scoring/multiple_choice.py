"""Multiple choice: the first token's probability decides between the choices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localign.statistics.resampling import Rows, Statistic
from localign.vlm.scoring.base import Benchmark
from localign.vlm.scoring.metrics import (
    Auroc,
    AveragePrecision,
    Ratio,
    macro_average_precision,
    one_vs_one_auroc,
    rows_by,
)
from localign.vlm.scoring.questions import Answer, AnswerScore, Question, Sample


class MultipleChoice(Benchmark):
    """A benchmark of choices. The payload's ``label`` is the index of the right choice."""

    def score_answer(self, question: Question, answer: Answer) -> AnswerScore:
        """1 if the most probable choice is right, else 0; the first of equally probable choices counts."""
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


def multiple_choice_metrics(
    samples: Sequence[Sample], name: str, splits: Sequence[str]
) -> dict[str, Statistic]:
    """Accuracy, ROC area and average precision of each split and, as ``final``, of all questions.

    The ROC area is the mean over pairs of classes, average precision the mean over classes. Classes that do not occur
    are left out.
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
    """ROC area and average precision of the positive choice.

    Args:
        prefix: Of the metrics' names.
        positive: Probability of the positive choice, ``(n,)``.
        labels: Whether the positive choice is right, ``(n,)``.
        rows: Indices of the samples that count.
    """
    return {
        f"{prefix}-AUCROC": Auroc(positive[rows], labels[rows], rows),
        f"{prefix}-AUCPR": AveragePrecision(positive[rows], labels[rows], rows),
    }
