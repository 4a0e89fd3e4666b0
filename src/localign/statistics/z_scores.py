"""z-scores: metrics with different scales, put on a common one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


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
