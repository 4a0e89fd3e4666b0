"""Intervals over training seeds, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from localign.statistics.paired import difference_over_seeds, interval_over_seeds


def test_intervals_over_seeds() -> None:
    # mean 70, deviation 2; t of 2 degrees of freedom is 4.3027
    assert interval_over_seeds([68, 70, 72]) == pytest.approx(
        [70 - 4.3027 * 2 / 3**0.5, 70 + 4.3027 * 2 / 3**0.5]
    )
    assert interval_over_seeds([70]) is None
    wide = interval_over_seeds([0, 1] * 15) or [math.nan, math.nan]  # 29 degrees of freedom: 2.045
    assert (wide[1] - wide[0]) / 2 == pytest.approx(2.0452 * np.std([0, 1] * 15, ddof=1) / 30**0.5, rel=1e-3)


def test_differences_over_seeds_are_paired_where_there_are_as_many() -> None:
    # differences 1, 2, 3: mean 2, deviation 1
    half = 4.3027 / 3**0.5
    assert difference_over_seeds([60, 70, 80], [61, 72, 83]) == pytest.approx([2 - half, 2 + half])
    # Welch: variances 4/2 and 1/3 of the means, (7/3)^2 / (4 + 1/18) = 1.34 degrees of freedom, rounded down
    half = 12.7062 * (4 / 2 + 1 / 3) ** 0.5
    apart = difference_over_seeds([60 - 2**0.5, 60 + 2**0.5], [71, 72, 73])
    assert apart == pytest.approx([12 - half, 12 + half])
    assert difference_over_seeds([60], [61, 62]) is None
    assert difference_over_seeds([60, 60], [61, 61, 61]) == [1, 1]
