"""z-scores: metrics with different scales, put on a common one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ZScores:
    """The metrics of a pool of models in standard deviations; they hold for this pool only."""

    means: dict[str, float]
    """By metric, over the models that have it."""
    deviations: dict[str, float]
    """By metric: population standard deviation (divided by n); 1 for a metric of a single model."""
    scores: dict[str, dict[str, float]]
    """By model and metric: distance from the mean in standard deviations."""
    averages: dict[str, float | None]
    """By model: mean over the metrics it has; None for a model without metrics."""


def z_scores(metrics: Mapping[str, Mapping[str, float | None]]) -> ZScores:
    """Put the metrics of several models on common scales.

    A metric on which all models agree gives every model the z-score 0.

    Args:
        metrics: By model and metric. A value that is None or missing counts nowhere.
    """
    columns: dict[str, list[float]] = {}
    for row in metrics.values():
        for name, value in row.items():
            if value is not None:
                columns.setdefault(name, []).append(value)
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    deviations = {name: float(np.std(v)) if len(v) > 1 else 1.0 for name, v in columns.items()}
    scores = {
        model: {
            name: (value - means[name]) / deviations[name] if deviations[name] > 0 else 0.0
            for name, value in row.items()
            if value is not None
        }
        for model, row in metrics.items()
    }
    averages = {model: float(np.mean(list(row.values()))) if row else None for model, row in scores.items()}
    return ZScores(means, deviations, scores, averages)


def model_counts(scales: ZScores) -> dict[str, int]:
    """By metric, the number of models in the pool that have it."""
    return {name: sum(name in row for row in scales.scores.values()) for name in scales.means}


def average_replicates(scales: ZScores, model: str, replicates: Mapping[str, Tensor]) -> Tensor | None:
    """A model's mean z-score in every replicate, with the scales held fixed.

    Args:
        scales: Scales of the pool.
        model: One of its models.
        replicates: The model's metrics in every replicate, by name float64 ``(R,)``.

    Returns:
        float64 ``(R,)``; None for a model without metrics. A metric that a single model has, or on which all models
        agree, counts as 0.
    """
    scores = scales.scores[model]
    if not scores:
        return None
    counts = model_counts(scales)
    total = torch.zeros(len(next(iter(replicates.values()))), dtype=torch.float64)
    for name in scores:
        if counts[name] > 1 and scales.deviations[name] > 0:
            total += (replicates[name] - scales.means[name]) / scales.deviations[name]
    return total / len(scores)
