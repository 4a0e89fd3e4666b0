"""Figures on different scales, put on a common one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ZScores:
    """Figures of a pool of models on common scales; all belong to this pool only."""

    means: dict[str, float]
    """Of each figure, over the models that have it."""
    deviations: dict[str, float]
    """Population standard deviation (divided by n); 1 where one model alone has the figure."""
    scores: dict[str, dict[str, float]]
    """By model and figure: the distance from the mean in standard deviations."""
    averages: dict[str, float | None]
    """By model: the plain mean over its figures; None where it has none."""


def z_scores(figures: Mapping[str, Mapping[str, float | None]]) -> ZScores:
    """Put the figures of several models on common scales.

    Where all models agree, every z-score is 0.

    Args:
        figures: By model and figure; what is None or left out counts nowhere.
    """
    columns: dict[str, list[float]] = {}
    for row in figures.values():
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
        for model, row in figures.items()
    }
    averages = {model: float(np.mean(list(row.values()))) if row else None for model, row in scores.items()}
    return ZScores(means, deviations, scores, averages)
