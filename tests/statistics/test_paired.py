"""Differences over seeds: pairing, intervals, and values that were not measured."""

from __future__ import annotations

import math

import numpy as np
import pytest

from localign.statistics.paired import (
    PairedDifference,
    difference_interval_over_seeds,
    interval_over_seeds,
    paired_difference,
    seed_differences,
)


def test_interval_of_three_paired_seeds_by_hand() -> None:
    # Differences 0.10, 0.12, 0.08: mean 0.10, standard deviation 0.02, t(2) = 4.3027.
    result = paired_difference([0.50, 0.52, 0.54], [0.60, 0.64, 0.62])
    assert result.difference == pytest.approx(0.10)
    assert result.half_width == pytest.approx(4.3027 * 0.02 / math.sqrt(3))
    assert [result.baseline, result.aligned] == pytest.approx([0.52, 0.62])
    assert result.seeds == 3
    assert seed_differences([0.50, 0.52, 0.54], [0.60, 0.64, 0.62]) == pytest.approx([0.10, 0.12, 0.08])


def test_one_seed_has_a_difference_and_no_interval() -> None:
    result = paired_difference([0.5], [0.4])
    assert result.difference == pytest.approx(-0.1)
    assert result == PairedDifference(0.5, 0.4, result.difference, None, 1)


def test_a_single_baseline_is_paired_with_every_seed() -> None:
    result = paired_difference([0.5], [0.6, 0.7])
    assert result.difference == pytest.approx(0.15)
    assert result.seeds == 2
    assert seed_differences([0.5], [0.6, 0.7]) == pytest.approx([0.1, 0.2])


def test_a_pair_that_lacks_a_value_is_left_out() -> None:
    result = paired_difference([0.5, None, 0.7], [0.6, 0.9, math.nan])
    assert (result.baseline, result.aligned, result.seeds) == (0.5, 0.6, 1)


def test_nothing_to_compare_is_not_zero() -> None:
    one_side = paired_difference([0.5, 0.6], [])
    assert one_side.baseline == pytest.approx(0.55)
    assert one_side == PairedDifference(one_side.baseline, None, None, None, 0)
    assert paired_difference([], []) == PairedDifference(None, None, None, None, 0)


def test_intervals_over_seeds() -> None:
    # mean 70, deviation 2; t of 2 degrees of freedom is 4.3027
    assert interval_over_seeds([68, 70, 72]) == pytest.approx(
        [70 - 4.3027 * 2 / 3**0.5, 70 + 4.3027 * 2 / 3**0.5]
    )
    assert interval_over_seeds([70]) is None
    wide = interval_over_seeds([0, 1] * 15) or [math.nan, math.nan]  # 29 degrees of freedom: 2.045
    assert (wide[1] - wide[0]) / 2 == pytest.approx(2.0452 * np.std([0, 1] * 15, ddof=1) / 30**0.5, rel=1e-3)


def test_sides_with_equally_many_seeds_are_paired_and_others_are_not() -> None:
    # differences 1, 2, 3: mean 2, deviation 1
    half = 4.3027 / 3**0.5
    paired = difference_interval_over_seeds([60, 70, 80], [61, 72, 83])
    assert paired == pytest.approx([2 - half, 2 + half])
    # Welch: variances 4/2 and 1/3 of the means, (7/3)^2 / (4 + 1/18) = 1.34 degrees of freedom, rounded down
    half = 12.7062 * (4 / 2 + 1 / 3) ** 0.5
    unpaired = difference_interval_over_seeds([60 - 2**0.5, 60 + 2**0.5], [71, 72, 73])
    assert unpaired == pytest.approx([12 - half, 12 + half])
    assert difference_interval_over_seeds([60], [61, 62]) is None
    assert difference_interval_over_seeds([60, 60], [61, 61, 61]) == [1, 1]
