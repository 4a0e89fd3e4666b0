"""Student's t: half-widths of 95 % intervals for means of a few independent values, such as training runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
"""97.5 % quantiles for 1..30 degrees of freedom."""
_Z = 1.959964
"""97.5 % quantile of the normal distribution."""


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t.

    From a table up to 30 degrees of freedom; above, its expansion around the normal quantile to second order in
    ``1 / degrees``.

    Raises:
        ValueError: Fewer than one degree of freedom.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least one degree of freedom, not {degrees}")
    if degrees <= len(_QUANTILES):
        return _QUANTILES[degrees - 1]
    first = (_Z**3 + _Z) / (4 * degrees)
    return _Z + first + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * degrees**2)


def half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean: ``t(n - 1) * s / sqrt(n)``; None for fewer than two values."""
    if len(values) < 2:
        return None
    return t_quantile(len(values) - 1) * math.sqrt(_variance(values) / len(values))


def welch_half_width(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Half the 95 % interval of the difference of two means of unpaired values (Welch).

    The Welch-Satterthwaite degrees of freedom are rounded down, which widens the interval.

    Returns:
        None where either side has fewer than two values.
    """
    if min(len(first), len(second)) < 2:
        return None
    variances = [_variance(side) / len(side) for side in (first, second)]
    total = sum(variances)
    if total == 0:
        return 0.0
    degrees = total**2 / sum(
        variance**2 / (len(side) - 1) for variance, side in zip(variances, (first, second), strict=True)
    )
    return t_quantile(max(1, int(degrees))) * math.sqrt(total)


def _variance(values: Sequence[float]) -> float:
    """The unbiased sample variance."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)
