"""Figures over samples, each of which can also be computed on resampled data, for intervals.

A figure is a share in 0..1, or undefined where the samples do not determine it: an accuracy of no samples, an area
under a curve without a positive. No figure fails for that.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Rows = NDArray[np.int64]
"""Which samples a figure is over."""


class Draws:
    """Resampled data: how often each replicate draws every unit, and which unit each sample belongs to.

    Args:
        weights: float ``(R, units)``.
        unit: int64 ``(samples,)``.
    """

    def __init__(self, weights: Tensor, unit: Tensor) -> None:
        self._weights = (
            weights.double().T.contiguous()
        )  # units first: picking rows is far faster than columns
        self._unit = unit

    def __len__(self) -> int:
        """The number of replicates, R."""
        return self._weights.shape[1]

    def sums(self, values: NDArray[np.float64], rows: Rows) -> Tensor:
        """The sum of a value per sample over some samples, float64 ``(R,)``."""
        per_unit = torch.zeros(len(self._weights), dtype=torch.float64)
        per_unit.index_add_(0, self._unit[torch.from_numpy(rows)], torch.from_numpy(values))
        return per_unit @ self._weights

    def of(self, rows: Rows) -> Tensor:
        """How often some samples are drawn, float64 ``(rows, R)``."""
        return self._weights[self._unit[torch.from_numpy(rows)]]


class Statistic(Protocol):
    """A figure over n samples."""

    def value(self) -> float | None:
        """In 0..1; None where it is not defined."""

    def replicates(self, draws: Draws) -> Tensor:
        """The figure on every replicate, float64 ``(R,)``; NaN where it is not defined."""


def percent(share: float | None) -> float | None:
    """A share in percent."""
    return None if share is None else 100 * share


class Ratio:
    """The sum of one value over the sum of another: means, precision, recall, F1.

    Args:
        numerators: ``(n,)``.
        denominators: ``(n,)``; default 1 for every sample, which makes it a mean.
        rows: Which samples these are, int64 ``(n,)``; default all, in order.
    """

    def __init__(
        self, numerators: ArrayLike, denominators: ArrayLike | None = None, rows: Rows | None = None
    ) -> None:
        self._over = np.asarray(numerators, dtype=np.float64)
        self._under = (
            np.ones_like(self._over) if denominators is None else np.asarray(denominators, np.float64)
        )
        self._rows = np.arange(len(self._over)) if rows is None else rows

    def value(self) -> float | None:
        under = self._under.sum()
        return float(self._over.sum() / under) if under > 0 else None

    def replicates(self, draws: Draws) -> Tensor:
        return draws.sums(self._over, self._rows) / draws.sums(self._under, self._rows)


class Mean:
    """The mean of other figures, over those of them that are defined; undefined where none is."""

    def __init__(self, parts: Sequence[Statistic]) -> None:
        self._parts = parts

    def value(self) -> float | None:
        known = [value for value in (part.value() for part in self._parts) if value is not None]
        return sum(known) / len(known) if known else None

    def replicates(self, draws: Draws) -> Tensor:
        if not self._parts:
            return torch.full((len(draws),), torch.nan, dtype=torch.float64)
        return torch.stack([part.replicates(draws) for part in self._parts]).nanmean(dim=0)


class _Curve:
    """Scores for a positive class, sorted once.

    Args:
        scores: ``(n,)``, in 0..1, larger for positives.
        labels: bool ``(n,)``.
        rows: Which samples these are, int64 ``(n,)``; default all, in order.
    """

    def __init__(self, scores: ArrayLike, labels: ArrayLike, rows: Rows | None = None) -> None:
        # Sums of probabilities may exceed 1 by rounding, which the library takes for a sign of logits.
        scores = np.asarray(scores, dtype=np.float64).clip(0, 1)
        order = np.argsort(scores, kind="stable")
        self._scores = scores[order]
        self._labels = np.asarray(labels, dtype=bool)[order]
        self._rows = (np.arange(len(order)) if rows is None else rows)[order]
        self._positives = torch.from_numpy(np.flatnonzero(self._labels))

    def _places(self, side: Literal["left", "right"], of_positives: bool = False) -> Tensor:
        """For each positive: how many samples (or positives) score less, or (right) not more, int64 ``(P,)``."""
        positives = self._scores[self._labels]
        return torch.from_numpy(np.searchsorted(positives if of_positives else self._scores, positives, side))

    def _weights(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """How often positives are drawn ``(P, R)``, and the first k samples together ``(n + 1, R)``; float64."""
        weights = draws.of(self._rows)
        return weights[self._positives], _totals(weights)

    def _tensors(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self._scores), torch.from_numpy(self._labels).long()


def _totals(weights: Tensor) -> Tensor:
    """The sum of the first k rows, for k = 0, 1, ..., all."""
    return torch.cat([weights.new_zeros(1, weights.shape[1]), weights.cumsum(dim=0)])


class Auroc(_Curve):
    """Area under the ROC curve; undefined without positives or without negatives."""

    def value(self) -> float | None:
        from torchmetrics.functional.classification import binary_auroc

        if self._labels.all() or not self._labels.any():
            return None
        return float(binary_auroc(*self._tensors()))

    def replicates(self, draws: Draws) -> Tensor:
        """Pairs in order over all pairs of a positive and a negative; a tie is half in order."""
        positives, totals = self._weights(draws)
        beaten = (totals[self._places("left")] + totals[self._places("right")]) / 2
        count = positives.sum(0)
        # Among themselves positives beat each other half of the time, whatever they score.
        return ((positives * beaten).sum(0) - count**2 / 2) / (count * (totals[-1] - count))


class AveragePrecision(_Curve):
    """Area under the precision-recall curve as steps; undefined without positives."""

    def value(self) -> float | None:
        from torchmetrics.functional.classification import binary_average_precision

        if not self._labels.any():
            return None
        return float(binary_average_precision(*self._tensors()))

    def replicates(self, draws: Draws) -> Tensor:
        """The mean over positives of the share of positives among what scores as high."""
        positives, totals = self._weights(draws)
        of_positives = _totals(positives)
        as_high = totals[-1] - totals[self._places("left")]
        hits = of_positives[-1] - of_positives[self._places("left", of_positives=True)]
        # Where nothing scores as high, the positive itself was not drawn.
        return (positives * hits / as_high.clamp(min=1)).sum(0) / positives.sum(0)


def one_vs_one_auroc(probabilities: ArrayLike, labels: ArrayLike, rows: Rows | None = None) -> Statistic:
    """Mean over the pairs of classes that occur of the area under the ROC curve that tells one from the other.

    Each pair counts once: as the mean of its two curves, one with either class as the positive one.

    Args:
        probabilities: ``(n, classes)``.
        labels: int ``(n,)``.
        rows: Which samples these are, int64 ``(n,)``; default all, in order.
    """
    scores, truth, indices = _table(probabilities, labels, rows)
    members = {int(c): np.flatnonzero(truth == c) for c in np.unique(truth)}
    curves: list[Statistic] = []
    for first, second in itertools.permutations(members, 2):
        pair = np.concatenate([members[first], members[second]])
        curves.append(Auroc(scores[pair, first], truth[pair] == first, indices[pair]))
    return Mean(curves)


def macro_average_precision(
    probabilities: ArrayLike, labels: ArrayLike, rows: Rows | None = None
) -> Statistic:
    """Mean over the classes that occur of the average precision of one against all others; arguments as above."""
    scores, truth, indices = _table(probabilities, labels, rows)
    return Mean([AveragePrecision(scores[:, c], truth == c, indices) for c in np.unique(truth)])


def _table(
    probabilities: ArrayLike, labels: ArrayLike, rows: Rows | None
) -> tuple[NDArray[np.float64], NDArray[np.int64], Rows]:
    truth = np.asarray(labels, dtype=np.int64)
    scores = np.asarray(probabilities, dtype=np.float64)
    indices = np.arange(len(truth)) if rows is None else rows
    return scores, truth, indices


def rows_by(keys: Iterable[str]) -> defaultdict[str, Rows]:
    """Which samples have each key; an empty array for keys that none has."""
    found: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        found.setdefault(key, []).append(row)
    arrays = {key: np.asarray(rows, dtype=np.int64) for key, rows in found.items()}
    return defaultdict(lambda: np.zeros(0, dtype=np.int64), arrays)
