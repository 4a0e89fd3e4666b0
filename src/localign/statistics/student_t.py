"""Intervals over training seeds, by Student's t: what other runs of the same training would have given."""

from __future__ import annotations

import math
from collections.abc import Sequence

T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1..30 degrees of freedom."""
_Z = 1.959964


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: a table up to 30 degrees of freedom, then its expansion in 1/n.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least one degree of freedom, not {degrees}")
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    first = (_Z**3 + _Z) / (4 * degrees)
    return _Z + first + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * degrees**2)


def half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    return t_quantile(len(values) - 1) * math.sqrt(_variance(values) / len(values))


def half_width_apart(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Half the 95 % interval of the difference of two means, by Welch: nothing pairs the values of either side.

    The degrees of freedom are rounded down, to the wider interval. None where a side has fewer than two values.
    """
    if min(len(first), len(second)) < 2:
        return None
    parts = [_variance(side) / len(side) for side in (first, second)]
    total = sum(parts)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(
        part**2 / (len(side) - 1) for part, side in zip(parts, (first, second), strict=True)
    )
    return t_quantile(max(1, int(freedom))) * math.sqrt(total)


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)
