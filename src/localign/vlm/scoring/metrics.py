"""Metrics over samples: ratios, means, and areas under curves, each also on resampled images.

A metric is a share in 0..1. Where the samples do not define it (an accuracy of no samples, an area under a curve
without positives), its value is None and its replicates are NaN; nothing raises.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from localign.statistics.resampling import Resamples, Rows, Statistic


def percent(share: float | None) -> float | None:
    """A share in percent; None for None."""
    return None if share is None else 100 * share


class Ratio:
    """The sum of numerators over the sum of denominators: means, precision, recall, F1.

    Args:
        numerators: ``(n,)``.
        denominators: ``(n,)``; default 1 for every sample, which makes the ratio a mean.
        rows: Indices of the samples, int64 ``(n,)``; default all samples, in order.
    """

    def __init__(
        self, numerators: ArrayLike, denominators: ArrayLike | None = None, rows: Rows | None = None
    ) -> None:
        self._numerators = np.asarray(numerators, dtype=np.float64)
        self._denominators = (
            np.ones_like(self._numerators) if denominators is None else np.asarray(denominators, np.float64)
        )
        self._rows = np.arange(len(self._numerators)) if rows is None else rows

    def value(self) -> float | None:
        total = self._denominators.sum()
        return float(self._numerators.sum() / total) if total > 0 else None

    def replicates(self, resamples: Resamples) -> Tensor:
        return resamples.sums(self._numerators, self._rows) / resamples.sums(self._denominators, self._rows)


class Mean:
    """The mean of those metrics that are defined; undefined if no metric is."""

    def __init__(self, parts: Sequence[Statistic]) -> None:
        self._parts = parts

    def value(self) -> float | None:
        values = [value for part in self._parts if (value := part.value()) is not None]
        return sum(values) / len(values) if values else None

    def replicates(self, resamples: Resamples) -> Tensor:
        if not self._parts:
            return torch.full((len(resamples),), torch.nan, dtype=torch.float64)
        return torch.stack([part.replicates(resamples) for part in self._parts]).nanmean(dim=0)


class _Curve:
    """Scores for a positive class, sorted once.

    Args:
        scores: ``(n,)``, in 0..1, larger for positives.
        labels: bool ``(n,)``.
        rows: Indices of the samples, int64 ``(n,)``; default all samples, in order.
    """

    def __init__(self, scores: ArrayLike, labels: ArrayLike, rows: Rows | None = None) -> None:
        # Sums of probabilities may exceed 1 by rounding; torchmetrics takes values above 1 for logits.
        scores = np.asarray(scores, dtype=np.float64).clip(0, 1)
        order = np.argsort(scores, kind="stable")
        self._scores = scores[order]
        self._labels = np.asarray(labels, dtype=bool)[order]
        self._rows = (np.arange(len(order)) if rows is None else rows)[order]
        self._positives = torch.from_numpy(np.flatnonzero(self._labels))

    def _ranks(self, side: Literal["left", "right"], among_positives: bool = False) -> Tensor:
        """For each positive, the number of samples (or positives) with a lower score, int64 ``(P,)``.

        With side ``right``, samples with the same score count too.
        """
        positives = self._scores[self._labels]
        return torch.from_numpy(
            np.searchsorted(positives if among_positives else self._scores, positives, side)
        )

    def _weights(self, resamples: Resamples) -> tuple[Tensor, Tensor]:
        """How often each positive is drawn ``(P, R)``, and the first k samples together ``(n + 1, R)``; float64."""
        weights = resamples.counts(self._rows)
        return weights[self._positives], _cumulative(weights)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._scores), torch.from_numpy(self._labels).long()


def _cumulative(weights: Tensor) -> Tensor:
    """The sum of the first k rows, for k = 0, 1, ..., all."""
    return torch.cat([weights.new_zeros(1, weights.shape[1]), weights.cumsum(dim=0)])


class Auroc(_Curve):
    """Area under the ROC curve; undefined without positives or without negatives."""

    def value(self) -> float | None:
        from torchmetrics.functional.classification import binary_auroc

        if self._labels.all() or not self._labels.any():
            return None
        return float(binary_auroc(*self._tensors()))

    def replicates(self, resamples: Resamples) -> Tensor:
        """The share of pairs of a positive and a negative that are in order; a tie counts half."""
        positives, totals = self._weights(resamples)
        in_order = (totals[self._ranks("left")] + totals[self._ranks("right")]) / 2
        count = positives.sum(0)
        # Pairs of two positives add up to half of their number, for any scores.
        return ((positives * in_order).sum(0) - count**2 / 2) / (count * (totals[-1] - count))


class AveragePrecision(_Curve):
    """Area under the precision-recall curve as steps; undefined without positives."""

    def value(self) -> float | None:
        from torchmetrics.functional.classification import binary_average_precision

        if not self._labels.any():
            return None
        return float(binary_average_precision(*self._tensors()))

    def replicates(self, resamples: Resamples) -> Tensor:
        """The mean over positives of the precision among the samples that score at least as high."""
        positives, totals = self._weights(resamples)
        positive_totals = _cumulative(positives)
        as_high = totals[-1] - totals[self._ranks("left")]
        hits = positive_totals[-1] - positive_totals[self._ranks("left", among_positives=True)]
        # as_high is 0 only for a positive that was not drawn; its weight is 0 as well.
        return (positives * hits / as_high.clamp(min=1)).sum(0) / positives.sum(0)


def one_vs_one_auroc(probabilities: ArrayLike, labels: ArrayLike, rows: Rows | None = None) -> Statistic:
    """Area under the ROC curve between two classes, averaged over all pairs of classes that occur.

    Each pair counts once: as the mean of two curves, with either class as the positive one.

    Args:
        probabilities: ``(n, classes)``.
        labels: int ``(n,)``.
        rows: Indices of the samples, int64 ``(n,)``; default all samples, in order.
    """
    scores, truth, indices = _arrays(probabilities, labels, rows)
    members = {int(c): np.flatnonzero(truth == c) for c in np.unique(truth)}
    curves: list[Statistic] = []
    for first, second in itertools.permutations(members, 2):
        pair = np.concatenate([members[first], members[second]])
        curves.append(Auroc(scores[pair, first], truth[pair] == first, indices[pair]))
    return Mean(curves)


def macro_average_precision(
    probabilities: ArrayLike, labels: ArrayLike, rows: Rows | None = None
) -> Statistic:
    """Average precision of each class against all others, averaged over the classes that occur.

    Args:
        probabilities: ``(n, classes)``.
        labels: int ``(n,)``.
        rows: Indices of the samples, int64 ``(n,)``; default all samples, in order.
    """
    scores, truth, indices = _arrays(probabilities, labels, rows)
    return Mean([AveragePrecision(scores[:, c], truth == c, indices) for c in np.unique(truth)])


def _arrays(
    probabilities: ArrayLike, labels: ArrayLike, rows: Rows | None
) -> tuple[NDArray[np.float64], NDArray[np.int64], Rows]:
    truth = np.asarray(labels, dtype=np.int64)
    scores = np.asarray(probabilities, dtype=np.float64)
    indices = np.arange(len(truth)) if rows is None else rows
    return scores, truth, indices


def rows_by(keys: Iterable[str]) -> defaultdict[str, Rows]:
    """The indices of the samples with each key, int64; an empty array for a key that does not occur."""
    found: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        found.setdefault(key, []).append(row)
    arrays = {key: np.asarray(rows, dtype=np.int64) for key, rows in found.items()}
    return defaultdict(lambda: np.zeros(0, dtype=np.int64), arrays)
