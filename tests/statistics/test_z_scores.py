"""z-scores of a pool of models, by hand; and their averages on resampled metrics."""

from __future__ import annotations

import math

import pytest
import torch

from localign.statistics.z_scores import average_replicates, model_counts, z_scores


def test_z_scores_by_hand() -> None:
    found = z_scores(
        {
            "a": {"x": 60.0, "y": 10.0, "alone": 5.0, "same": 1.0},
            "b": {"x": 70.0, "y": None, "same": 1.0},
            "c": {"x": 80.0, "y": 30.0},
            "d": {},
        }
    )
    deviation = math.sqrt(200 / 3)
    assert found.means == pytest.approx({"x": 70, "y": 20, "alone": 5, "same": 1})
    assert found.deviations == pytest.approx({"x": deviation, "y": 10, "alone": 1, "same": 0})
    assert found.scores["a"] == pytest.approx({"x": -10 / deviation, "y": -1, "alone": 0, "same": 0})
    assert found.scores["b"] == pytest.approx({"x": 0, "same": 0})
    assert found.averages == pytest.approx(
        {"a": (-10 / deviation - 1) / 4, "b": 0, "c": (10 / deviation + 1) / 2, "d": None}
    )


def test_average_replicates_use_the_scales_of_the_pool() -> None:
    scales = z_scores({"a": {"x": 60.0, "alone": 5.0, "same": 1.0}, "b": {"x": 80.0, "same": 1.0}, "c": {}})
    assert model_counts(scales) == {"x": 2, "alone": 1, "same": 2}
    replicates = {
        "x": torch.tensor([50.0, 70.0, 90.0], dtype=torch.float64),
        "alone": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        "same": torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64),
    }
    averages = average_replicates(scales, "a", replicates)
    assert averages is not None
    assert averages.tolist() == pytest.approx(
        [-2 / 3, 0, 2 / 3]
    )  # mean 70, deviation 10; the others count as 0
    assert average_replicates(scales, "c", {}) is None
