"""Metrics: values by hand; and each replicate equals the metric of the samples that it draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from localign.statistics.resampling import Resamples, Rows, Statistic
from localign.vlm.scoring.metrics import (
    Auroc,
    AveragePrecision,
    Mean,
    Ratio,
    macro_average_precision,
    one_vs_one_auroc,
    rows_by,
)

Make = Callable[[Rows], Statistic]
"""Makes a metric of the given samples; a sample may occur several times."""


def brute_auroc(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> float | None:
    """The share of pairs of a positive and a negative that are in order; a tie counts half."""
    pairs = [
        (p > n) + (p == n) / 2
        for p, n in itertools.product(
            (s for s, label in zip(scores, labels, strict=True) if label),
            (s for s, label in zip(scores, labels, strict=True) if not label),
        )
    ]
    return sum(pairs) / len(pairs) if pairs else None


def brute_average_precision(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> float | None:
    """The mean over positives of the precision among the samples that score at least as high."""
    found = [
        np.mean([label for s, label in zip(scores, labels, strict=True) if s >= score])
        for score, positive in zip(scores, labels, strict=True)
        if positive
    ]
    return float(np.mean(found)) if found else None


@pytest.mark.parametrize("seed", range(20))
def test_areas_equal_their_definitions(seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores, labels = draw.integers(0, 6, 15) / 5, draw.integers(0, 2, 15).astype(bool)  # many ties
    assert Auroc(scores, labels).value() == pytest.approx(brute_auroc(scores, labels), abs=1e-6)
    assert AveragePrecision(scores, labels).value() == pytest.approx(
        brute_average_precision(scores, labels), abs=1e-6
    )


def test_areas_by_hand() -> None:
    # 0.35 loses to 0.4 and wins against 0.1; 0.8 wins twice
    assert Auroc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]).value() == pytest.approx(0.75)
    # 1 at 0.8, 2/3 at 0.35
    assert AveragePrecision([0.1, 0.4, 0.35, 0.8], [False, False, True, True]).value() == pytest.approx(5 / 6)
    # a sum of probabilities may round to more than 1
    assert Auroc([1 + 1e-15, 0.5, 0.6], [True, False, False]).value() == 1


def test_undefined_values_are_none() -> None:
    assert Auroc([0.1, 0.4], [True, True]).value() is None
    assert Auroc([0.1, 0.4], [False, False]).value() is None
    assert Auroc([], []).value() is None
    assert AveragePrecision([0.1, 0.4], [False, False]).value() is None
    assert AveragePrecision([0.1, 0.4], [True, True]).value() == 1
    assert Ratio([]).value() is None
    assert Ratio([0.0], [0.0]).value() is None
    assert Mean([]).value() is None
    assert Mean([Ratio([]), Ratio([1.0, 0.0])]).value() == 0.5
    assert one_vs_one_auroc(np.ones((3, 4)) / 4, [2, 2, 2]).value() is None
    assert one_vs_one_auroc(np.ones((0, 4)), []).value() is None


def test_one_against_one_leaves_out_classes_that_do_not_occur() -> None:
    table = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]])
    # classes 0 and 1 occur. Column 0: 0.6 and 0.5 of class 0 above 0.2. Column 1: 0.7 above 0.3 and 0.4
    assert one_vs_one_auroc(table, [0, 1, 0]).value() == 1
    # column 0: 0.6 of class 0 against 0.2 and 0.5. Column 1: 0.7 and 0.4 above 0.3
    assert one_vs_one_auroc(table, [0, 1, 1]).value() == 1
    # column 0: 0.5 of class 0 above 0.2, below 0.6: 1/2. Column 1: 0.3 and 0.7 of class 1 around 0.4: 1/2
    assert one_vs_one_auroc(table, [1, 1, 0]).value() == pytest.approx(0.5)
    # precision of class 0: 1/2; of class 1: 1 at 0.7, 2/3 at 0.3
    assert macro_average_precision(table, [1, 1, 0]).value() == pytest.approx((1 / 2 + 5 / 6) / 2)


def test_precision_recall_and_f1_are_ratios() -> None:
    truth, said = np.array([1, 1, 1, 0.0]), np.array([1, 0, 0, 1.0])
    assert Ratio(truth * said, said).value() == 1 / 2
    assert Ratio(truth * said, truth).value() == pytest.approx(1 / 3)
    assert Ratio(2 * truth * said, truth + said).value() == pytest.approx(2 / 5)


def table(seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    draw = np.random.default_rng(seed)
    probabilities = draw.integers(1, 5, (12, 3)).astype(float)
    return probabilities / probabilities.sum(1, keepdims=True), draw.integers(0, 3, 12)


PROBABILITIES, LABELS = table(0)
SCORES = PROBABILITIES[:, 0]
METRICS: dict[str, Make] = {
    "ratio": lambda rows: Ratio(SCORES[rows] * (LABELS[rows] == 0), LABELS[rows] == 0),
    "auroc": lambda rows: Auroc(SCORES[rows], LABELS[rows] == 0),
    "average precision": lambda rows: AveragePrecision(SCORES[rows], LABELS[rows] == 0),
    "one against one": lambda rows: one_vs_one_auroc(PROBABILITIES[rows], LABELS[rows]),
    "macro": lambda rows: macro_average_precision(PROBABILITIES[rows], LABELS[rows]),
    "mean": lambda rows: Mean([Ratio(SCORES[rows]), Auroc(SCORES[rows], LABELS[rows] == 1)]),
}


@pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)
def test_replicates_equal_the_metric_of_the_drawn_samples(make: Make) -> None:
    unit = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 6])  # the cluster of each sample
    weights = torch.from_numpy(np.random.default_rng(1).multinomial(7, [1 / 7] * 7, 40)).float()
    replicates = make(np.arange(12)).replicates(Resamples(weights, unit))
    assert replicates.dtype == torch.float64
    undefined = 0
    for drawn, replicate in zip(weights.long(), replicates, strict=True):
        value = make(np.repeat(np.arange(12), drawn[unit].numpy())).value()
        undefined += value is None
        assert float(replicate) == pytest.approx(math.nan if value is None else value, abs=1e-6, nan_ok=True)
    assert undefined < 20


def test_metrics_over_some_samples_draw_those_samples() -> None:
    rows = np.array([3, 4, 5, 10])
    draws = Resamples(torch.rand(9, 12), torch.arange(12))
    for name, part in (
        ("auroc", Auroc(SCORES[rows], LABELS[rows] == 0, rows)),
        ("one against one", one_vs_one_auroc(PROBABILITIES[rows], LABELS[rows], rows)),
        ("ratio", Ratio(SCORES[rows], rows=rows)),
    ):
        chosen = torch.zeros(12)
        chosen[torch.from_numpy(rows)] = 1
        everything = METRICS[name] if name != "ratio" else lambda r: Ratio(SCORES[r])
        alone = Resamples(draws.counts(np.arange(12)).T * chosen, torch.arange(12))
        torch.testing.assert_close(
            part.replicates(draws), everything(np.arange(12)).replicates(alone), equal_nan=True
        )


def test_rows_by_key() -> None:
    rows = rows_by(["a", "b", "a"])
    assert rows["a"].tolist() == [0, 2]
    assert rows["c"].tolist() == []
    assert sorted(rows_by(["a", "b", "a"])) == ["a", "b"]
