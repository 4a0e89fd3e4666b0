"""Means and differences over training seeds, with intervals by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from localign.statistics.student_t import half_width, welch_half_width


@dataclass(frozen=True)
class PairedDifference:
    """A quantity before and after alignment, over seeds. None where it was not measured."""

    baseline: float | None
    """Mean over seeds."""
    aligned: float | None
    """Mean over seeds."""
    difference: float | None
    """Mean over seeds of aligned minus baseline."""
    half_width: float | None
    """Half the 95 % interval of the difference; None for fewer than two pairs."""
    seeds: int
    """Number of pairs behind the difference."""


def paired_difference(baseline: Sequence[float | None], aligned: Sequence[float | None]) -> PairedDifference:
    """Means and the paired difference with its 95 % interval.

    The interval is mean +- t * s / sqrt(n) with n - 1 degrees of freedom, where s is the standard deviation of the n
    differences.

    Args:
        baseline: One value per seed, or a single value that is paired with every seed of ``aligned``. None and
            values that are not finite count as not measured.
        aligned: The same for the other side.

    Returns:
        The difference and both means are over the pairs with both values. Without such a pair there is no
        difference, and each mean is over the values of its side.
    """
    pairs = _measured_pairs(baseline, aligned)
    if not pairs:
        return PairedDifference(_mean(_measured(baseline)), _mean(_measured(aligned)), None, None, 0)
    differences = [after - before for before, after in pairs]
    before, after = (_mean(side) for side in zip(*pairs, strict=True))
    return PairedDifference(before, after, _mean(differences), half_width(differences), len(pairs))


def seed_differences(baseline: Sequence[float | None], aligned: Sequence[float | None]) -> list[float]:
    """The differences behind :func:`paired_difference`, one per pair with both values."""
    return [after - before for before, after in _measured_pairs(baseline, aligned)]


def interval_over_seeds(values: Sequence[float]) -> list[float] | None:
    """The 95 % interval ``[low, high]`` of the mean over training seeds; None for fewer than two runs.

    It covers other seeds on the same images, not other images.
    """
    half = half_width(values)
    return None if half is None else _around(sum(values) / len(values), half)


def difference_interval_over_seeds(first: Sequence[float], second: Sequence[float]) -> list[float] | None:
    """The 95 % interval ``[low, high]`` of the mean of ``second`` minus the mean of ``first``.

    Sides with equally many runs are paired by position; other sides are unpaired (Welch).

    Returns:
        None where either side has fewer than two runs: a single run does not show how far others would lie from it.
    """
    if min(len(first), len(second)) < 2:
        return None
    if len(first) == len(second):
        half = half_width([after - before for before, after in zip(first, second, strict=True)])
    else:
        half = welch_half_width(first, second)
    middle = sum(second) / len(second) - sum(first) / len(first)
    return None if half is None else _around(middle, half)


def _measured_pairs(
    baseline: Sequence[float | None], aligned: Sequence[float | None]
) -> list[tuple[float, float]]:
    count = max(len(baseline), len(aligned))
    sides = (list(side) * count if len(side) == 1 else side for side in (baseline, aligned))
    return [
        (float(before), float(after))
        for before, after in zip(*sides, strict=False)
        if before is not None and after is not None and math.isfinite(before) and math.isfinite(after)
    ]


def _measured(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _around(middle: float, half: float) -> list[float]:
    return [middle - half, middle + half]
