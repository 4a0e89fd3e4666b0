"""Statistics on resampled clusters of samples: replicates, and paired differences between two models.

A cluster is what is drawn as a whole, such as an image with all of its questions. Draws depend on the replicate and the
number of clusters alone: two models on the same samples get the same draws, so their difference is paired.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localign.statistics.bootstrap import REPLICATES, percentile_interval, weight_chunks

Rows = NDArray[np.int64]
"""Indices of the samples that a statistic is over."""


class Resamples:
    """How often each replicate draws each cluster, and which cluster each sample belongs to.

    Args:
        weights: float ``(R, clusters)``.
        cluster: int64 ``(samples,)``.
    """

    def __init__(self, weights: Tensor, cluster: Tensor) -> None:
        # Clusters first: picking rows is far faster than picking columns.
        self._weights = weights.double().T.contiguous()
        self._cluster = cluster

    def __len__(self) -> int:
        """The number of replicates, R."""
        return self._weights.shape[1]

    def sums(self, values: NDArray[np.float64], rows: Rows) -> Tensor:
        """The sum of one value per sample in every replicate.

        Args:
            values: ``(n,)``.
            rows: The samples that the values belong to, ``(n,)``.

        Returns:
            float64 ``(R,)``.
        """
        per_cluster = torch.zeros(len(self._weights), dtype=torch.float64)
        per_cluster.index_add_(0, self._cluster[torch.from_numpy(rows)], torch.from_numpy(values))
        return per_cluster @ self._weights

    def counts(self, rows: Rows) -> Tensor:
        """How often each replicate draws each of the samples, float64 ``(rows, R)``."""
        return self._weights[self._cluster[torch.from_numpy(rows)]]


class Statistic(Protocol):
    """A share in 0..1 over some samples, also on resampled data."""

    def value(self) -> float | None:
        """The share; None where the samples do not define it."""

    def replicates(self, resamples: Resamples) -> Tensor:
        """The share in every replicate, float64 ``(R,)``; NaN where it is not defined."""


def bootstrap_replicates(
    statistics: Mapping[str, Statistic], clusters: Sequence[Hashable], replicates: int = REPLICATES
) -> dict[str, Tensor]:
    """Every statistic on clusters drawn with replacement.

    Args:
        statistics: By name, all over the same samples.
        clusters: The cluster of each sample, ``(samples,)``; numbered in the order of their first sample.
        replicates: Number of replicates.

    Returns:
        By name float64 ``(replicates,)``; NaN where a replicate does not define the statistic.
    """
    numbers: dict[Hashable, int] = {}
    cluster = torch.tensor([numbers.setdefault(name, len(numbers)) for name in clusters])
    parts: dict[str, list[Tensor]] = {name: [] for name in statistics}
    for weights in weight_chunks(len(numbers), replicates, row_bytes=8 * len(clusters)):
        resamples = Resamples(weights, cluster)
        for name, statistic in statistics.items():
            parts[name].append(statistic.replicates(resamples))
    return {name: torch.cat(chunks) for name, chunks in parts.items()}


class ResampledMetrics(NamedTuple):
    """The metrics of one model on one set of samples."""

    values: Mapping[str, float | None]
    """By name; None where a metric is not defined."""
    replicates: Mapping[str, Tensor]
    """By name float64 ``(R,)``, see :func:`bootstrap_replicates`."""


def mean_metrics(runs: Sequence[ResampledMetrics]) -> ResampledMetrics:
    """The mean of each metric over training seeds.

    Returns:
        A metric that some seed does not define is None. Replicates are means over seeds as well, so their spread is
        the spread over clusters alone.
    """
    values: dict[str, float | None] = {}
    for name in runs[0].values:
        defined = [value for run in runs if (value := run.values.get(name)) is not None]
        values[name] = sum(defined) / len(defined) if len(defined) == len(runs) else None
    replicates = {
        name: torch.stack([run.replicates[name] for run in runs]).mean(dim=0) for name in runs[0].replicates
    }
    return ResampledMetrics(values, replicates)


class ResampledDifference(NamedTuple):
    """A metric of the second model minus the same metric of the first."""

    value: float | None
    interval: list[float] | None
    """``[low, high]``, 95 %, paired over clusters; the models differ beyond chance where it excludes 0."""


def paired_differences(first: ResampledMetrics, second: ResampledMetrics) -> dict[str, ResampledDifference]:
    """The difference of each metric between two models on the same samples, by name."""
    found = {}
    for name, replicates in first.replicates.items():
        before, after = first.values.get(name), second.values.get(name)
        value = None if before is None or after is None else after - before
        found[name] = ResampledDifference(value, percentile_interval(second.replicates[name] - replicates))
    return found
