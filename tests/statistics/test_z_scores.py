"""z-scores against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from localign.statistics.z_scores import z_scores


def test_z_scores_by_hand() -> None:
    result = z_scores(
        {
            "a": {"x": 60.0, "y": 10.0, "alone": 5.0, "same": 1.0},
            "b": {"x": 70.0, "y": None, "same": 1.0},
            "c": {"x": 80.0, "y": 30.0},
            "d": {},
        }
    )
    deviation = math.sqrt(200 / 3)
    assert result.means == pytest.approx({"x": 70, "y": 20, "alone": 5, "same": 1})
    assert result.deviations == pytest.approx({"x": deviation, "y": 10, "alone": 1, "same": 0})
    assert result.scores["a"] == pytest.approx({"x": -10 / deviation, "y": -1, "alone": 0, "same": 0})
    assert result.scores["b"] == pytest.approx({"x": 0, "same": 0})
    assert result.averages == pytest.approx(
        {"a": (-10 / deviation - 1) / 4, "b": 0, "c": (10 / deviation + 1) / 2, "d": None}
    )
