"""Paired differences over training seeds, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localign.statistics.student_t import half_width, half_width_apart


@dataclass(frozen=True)
class PairedDifference:
    """A figure before and after, over seeds; shares in 0..1. None where it was not measured."""

    baseline: float | None
    aligned: float | None
    difference: float | None
    """Mean over seeds of aligned minus baseline."""
    half_width: float | None
    """Half the 95 % t-interval of the difference, paired over seeds; None for fewer than two seeds."""
    seeds: int
    """Pairs behind the difference."""


def paired(baseline: Sequence[float | None], aligned: Sequence[float | None]) -> PairedDifference:
    """Means and the paired difference with its 95 % t-interval.

    Args:
        baseline: One value per seed; a single one is held against every seed of the other side.
        aligned: The same.

    Returns:
        The difference is taken over seeds for which both values exist.
    """
    count = max(len(baseline), len(aligned))
    before, after = _repeated(baseline, count), _repeated(aligned, count)
    pairs = [(b, a) for b, a in zip(before, after, strict=False) if _known(b) and _known(a)]
    means = [_mean([v for v in values if _known(v)]) for values in (baseline, aligned)]
    if not pairs:
        return PairedDifference(means[0], means[1], None, None, 0)
    differences = [float(a) - float(b) for b, a in pairs if a is not None and b is not None]
    mean = sum(differences) / len(differences)
    means = [_mean(side) for side in zip(*pairs, strict=True)]
    return PairedDifference(means[0], means[1], mean, half_width(differences), len(differences))


def _repeated(values: Sequence[float | None], count: int) -> list[float | None]:
    return list(values) * count if len(values) == 1 else list(values)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [v for v in values if v is not None]
    return sum(numbers) / len(numbers) if numbers else None


def interval_over_seeds(values: Sequence[float]) -> list[float] | None:
    """The 95 % interval of the mean over training runs that differ in their seed, by Student's t.

    It says what other seeds would give on the same questions; :func:`intervals` says what other images would give to
    the same models. None for a single run.
    """
    half = half_width(values)
    return None if half is None else _around(float(np.mean(values)), half)


def difference_over_seeds(first: Sequence[float], second: Sequence[float]) -> list[float] | None:
    """The 95 % interval of the second model's mean over seeds minus the first's.

    As many runs on either side are taken for pairs, by their position (Student); otherwise none are (Welch). None
    where a side has a single run: nothing tells how far another run of it would lie.
    """
    if min(len(first), len(second)) < 2:
        return None
    found = paired(first, second)
    half = found.half_width if len(first) == len(second) else half_width_apart(first, second)
    return None if half is None else _around(float(np.mean(second) - np.mean(first)), half)


def _around(middle: float, half: float) -> list[float]:
    return [middle - half, middle + half]
