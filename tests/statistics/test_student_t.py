"""Student's t: quantiles, and intervals that cover what they say."""

from __future__ import annotations

import numpy as np
import pytest

from localign.statistics.student_t import half_width, t_quantile, welch_half_width


def test_t_quantiles_join_where_the_table_ends() -> None:
    assert t_quantile(1) == pytest.approx(12.7062, abs=1e-4)
    assert t_quantile(31) == pytest.approx(2.03951, abs=1e-4)
    assert t_quantile(100) == pytest.approx(1.98397, abs=1e-4)
    values = [t_quantile(n) for n in range(1, 200)]
    assert values == sorted(values, reverse=True)
    with pytest.raises(ValueError, match="degree"):
        t_quantile(0)


def test_a_single_value_has_no_interval() -> None:
    assert half_width([1.0]) is None
    assert welch_half_width([1.0], [1.0, 2.0]) is None
    assert half_width([1.0, 1.0]) == welch_half_width([1.0, 1.0], [2.0, 2.0]) == 0


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Five runs of one model; three and five of two whose scatter differs, where Welch's is somewhat too wide."""
    draw = np.random.default_rng(0)
    first, second = draw.normal(0, 1, (4000, 3)), draw.normal(0, 2, (4000, 5))
    alone = [abs(row.mean()) <= (half_width(row.tolist()) or 0) for row in second]
    apart = [
        abs(b.mean() - a.mean()) <= (welch_half_width(a.tolist(), b.tolist()) or 0)
        for a, b in zip(first, second, strict=True)
    ]
    assert 0.94 <= np.mean(alone) <= 0.96
    assert 0.94 <= np.mean(apart) <= 0.98
