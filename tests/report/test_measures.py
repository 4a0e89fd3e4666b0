"""The numbers behind figures and tables: pairs, estimates, differences, gains, sizes and the trend."""

from __future__ import annotations

import math

import pytest
from probe_results import results, twenty_pairs

from localign.report.figures.locality import measure_locality
from localign.report.tables.measures import (
    BackbonePair,
    change,
    chart_lines,
    class_gains,
    comparisons,
    display_names,
    estimate,
    fit_trend,
    main_head,
    size_bins,
)
from localign.report.tables.rows import MetricKey
from localign.results import RecallDifference

LOCAL = MetricKey("test", "transformer", "local")


def test_names_tell_which_backbone_is_which_aligned() -> None:
    found = comparisons(results({"x-baseline": (0.4, 0.5), "x": (0.5, 0.5), "y": (0.3, 0.3)}))
    assert found == [BackbonePair("x", "x-baseline", "x", True)]
    assert len(comparisons(results(twenty_pairs()))) == 10
    demo = comparisons(results({"baseline": (0.4, 0.5), "aligned": (0.5, 0.5)}, backbone="scenes-vit"))
    assert demo == [BackbonePair("scenes-vit", "baseline", "aligned", True)]


def test_pairs_of_the_results_win_over_names() -> None:
    listed = results({"a": (0.4, 0.5), "b": (0.5, 0.5)})
    listed["pairs"] = [["A", "b", "a"], ["gone", "a", "nowhere"]]
    assert comparisons(listed) == [BackbonePair("A", "b", "a", True)]
    assert display_names(listed) == {"a": "A, after", "b": "A, before"}


def test_plain_backbones_are_compared_with_the_first() -> None:
    found = results({"a": (0.4, 0.5), "b": (0.5, 0.5), "c": (0.1, 0.2)})
    assert [(c.before, c.after, c.aligned) for c in comparisons(found)] == [
        ("a", "b", False),
        ("a", "c", False),
    ]
    assert [(m.before, m.after) for m in chart_lines(found)] == [("a", None), (None, "b"), (None, "c")]
    assert comparisons(results({"a": (0.4, 0.5)})) == []


def test_an_estimate_is_the_mean_over_seeds_with_the_mean_bounds() -> None:
    found = estimate(results({"a": (0.5, 0.6)}, seeds=3)["probe"]["a"], LOCAL)
    assert found is not None
    assert found.value == pytest.approx(0.49)
    assert found.seeds == pytest.approx((0.50, 0.49, 0.48))
    assert found.interval == pytest.approx((0.48, 0.51))


def test_what_was_not_measured_is_none_and_not_zero() -> None:
    runs = results({"a": (0.5, 0.6)}, heads=("linear",))
    assert estimate(runs["probe"]["a"], LOCAL) is None
    assert main_head(runs) == "linear"
    broken = results({"a": (0.5, 0.6), "b": (0.5, 0.6)})
    for recall in (None, math.nan):
        broken["probe"]["b"][0]["results"]["test"]["transformer"]["local"]["macro_recall"] = recall
        assert estimate(broken["probe"]["b"], LOCAL) is None
        assert change(broken, "a", "b", LOCAL) is None


def test_a_bootstrap_of_the_results_wins_over_seeds() -> None:
    found = results({"a": (0.5, 0.6), "b": (0.6, 0.6)}, seeds=3)
    paired = change(found, "a", "b", LOCAL)
    assert paired is not None
    assert paired.over == "seeds"
    assert paired.value == pytest.approx(0.1)
    entry: RecallDifference = {
        "name": "b",
        "against": "a",
        "head": "transformer",
        "task": "local",
        "source": "test",
    }
    found["differences"] = [
        {**entry, "task": "global", "difference": 9.0, "interval": [8.0, 10.0]},
        {**entry, "source": "val", "difference": 7.0, "interval": [6.0, 8.0]},
        {**entry, "difference": 0.09, "interval": [-0.01, 0.2]},
    ]
    drawn = change(found, "a", "b", LOCAL)
    assert drawn is not None
    assert (drawn.value, drawn.interval, drawn.over, drawn.significant) == (
        0.09,
        (-0.01, 0.2),
        "images",
        False,
    )


def test_one_seed_without_bootstrap_is_certain_of_nothing() -> None:
    found = change(results({"a": (0.5, 0.6), "b": (0.9, 0.6)}), "a", "b", LOCAL)
    assert found is not None
    assert found.interval is None
    assert not found.significant


def test_gains_are_of_classes_that_occur_the_largest_first() -> None:
    found = results({"a": (0.4, 0.5), "b": (0.5, 0.5)}, kinds=True)
    before, after = (found["probe"][n][0]["results"]["test"]["transformer"]["local"] for n in "ab")
    before["class_recall"][3] = None
    gains = class_gains(found, comparisons(found)[0], LOCAL)
    assert [
        g.index for g in gains if g.index in (3, 9)
    ] == []  # 3 was not measured before, 9 has no positives
    assert len(gains) == 8
    assert [g.gain for g in gains] == sorted((g.gain for g in gains), reverse=True)
    kinds = found["class_kinds"] or []
    for g in gains:
        sides = [recalls["class_recall"][g.index] or math.nan for recalls in (before, after)]
        assert g.gain == pytest.approx(sides[1] - sides[0])
        assert g.kind == kinds[g.index]
        assert g.positives == 1000 - g.index


def test_an_empty_size_bin_has_no_recall() -> None:
    bins = size_bins(results({"a": (0.4, 0.5)}, seeds=2)["probe"]["a"], LOCAL)
    assert [(b.low, b.high) for b in bins[:2]] == [(0.0, 0.1), (0.1, 0.2)]
    assert len(bins[0].seeds) == 2
    assert (bins[9].seeds, bins[9].positives) == ((), 0)


def test_residuals_from_the_trend_sum_to_zero() -> None:
    points = [(0.3, 0.41), (0.37, 0.46), (0.44, 0.51), (0.46, 0.53), (0.39, 0.43)]
    trend = fit_trend(points)
    assert trend is not None
    residuals = [trend.relative_locality(*p) for p in points]
    assert sum(residuals) == pytest.approx(0, abs=1e-12)
    assert sum(r * g for r, (_, g) in zip(residuals, points, strict=True)) == pytest.approx(0, abs=1e-12)


def test_a_line_is_found_again_and_its_points_are_on_it() -> None:
    trend = fit_trend([(0.1 + 0.5 * g, g) for g in (0.2, 0.4, 0.9)])
    assert trend is not None
    assert [trend.slope, trend.intercept] == pytest.approx([0.5, 0.1])
    assert trend.relative_locality(0.35, 0.4) == pytest.approx(0.05)


def test_two_backbones_or_equal_ones_have_no_trend() -> None:
    assert fit_trend([]) is None
    assert fit_trend([(0.1, 0.2), (0.3, 0.4)]) is None
    assert fit_trend([(0.1, 0.2), (0.3, 0.2), (0.4, 0.2)]) is None


def test_one_backbone_may_be_the_before_of_several() -> None:
    found = results({"a": (0.4, 0.5), "b": (0.5, 0.5), "c": (0.6, 0.5)})
    found["pairs"] = [["B", "a", "b"], ["C", "a", "c"]]
    assert [(m.label, m.before, m.after) for m in chart_lines(found)] == [("B", "a", "b"), ("C", "a", "c")]
    assert display_names(found) == {"a": "a", "b": "B, after", "c": "C, after"}
    located = measure_locality(found, "transformer")
    assert [p.backbone for p in located.points] == ["a", "b", "c"]
    assert located.trend is None  # three points, but one backbone
