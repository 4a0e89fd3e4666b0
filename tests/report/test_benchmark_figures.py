"""Radar charts and bars of benchmarks are readable with any number of models, and have gaps for missing scores."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from test_figures import assert_readable, boxes, overlap

from localign.report.figures.radar import (
    Axis,
    Panel,
    Scale,
    Score,
    looks,
    radar_drawing,
    radar_figure,
    scale_of,
)
from localign.report.figures.scores import scores_drawing

LONG = "a benchmark whose name is far longer than anything"
CASES = {
    "two": (2, 14, 1),
    "four panels": (2, 14, 4),
    "eight": (8, 15, 1),
    "twelve": (12, 3, 1),
    "six": (6, 14, 2),
}
"""Models, axes, panels."""


def content(models: int, count: int, panels: int) -> tuple[list[Axis], list[Panel]]:
    draw = np.random.default_rng(0)
    axes = [Axis(LONG if i == 1 else f"TextVQA number {i}", 50.0, 2.0, models) for i in range(count)]
    names = ["the first", *(f"model {i}, with a name that goes on and on" for i in range(1, models))]

    def scores() -> list[Score]:
        return [
            Score(50 + 2 * z, z, (48.0, 52 + 2 * z), (49.0, 51.0), 2 * z, abs(z) > 1)
            for z in draw.normal(size=count)
        ]

    return axes, [Panel(f"panel {p}", {name: scores() for name in names}) for p in range(panels)]


@pytest.mark.parametrize("case", CASES)
def test_a_radar_is_readable(case: str) -> None:
    axes, panels = content(*CASES[case])
    figure = radar_figure(axes, panels, Scale(4), looks(list(panels[0].models)))
    figure.draw_without_rendering()
    paper = figure.bbox.padded(1)
    (legend,) = figure.legends
    groups = [boxes(legend.get_texts())]
    for ax in figure.get_axes():
        names = boxes(t for t in ax.texts if "±" in t.get_text())
        assert len(names) in (len(axes), 0)  # a last place may be empty
        groups.append([*names, *boxes([ax.title])])
    for group in groups:
        assert not overlap(group)
        assert all(paper.contains(*corner) for box in group for corner in (box.min, box.max))


@pytest.mark.parametrize("case", CASES)
def test_bars_are_readable(case: str) -> None:
    axes, panels = content(*CASES[case])
    figure = scores_drawing(axes, panels[0], looks(list(panels[0].models))).figure
    assert_readable(figure)
    for ax in figure.get_axes():
        assert not overlap(boxes(ax.texts))


def test_a_missing_benchmark_opens_the_line_and_leaves_out_the_bar(tmp_path: Path) -> None:
    axes, (panel,) = content(2, 5, 1)
    whole, torn = panel.models.values()
    panel = Panel("", {"whole": whole, "torn": [None, *torn[1:]]})
    style = looks(["whole", "torn"])
    scale = scale_of([0.0])
    figure = radar_figure(axes, [panel], scale, style)

    def lines(name: str) -> list[int]:
        """Sorted lengths of a model's lines: two points for each side, and all markers in one line."""
        found = [line for line in figure.get_axes()[0].lines if line.get_color() == style[name].colour]
        return sorted(len(np.atleast_1d(line.get_xdata())) for line in found)

    assert lines("whole") == [2, 2, 2, 2, 2, 5]
    assert lines("torn") == [2, 2, 2, 4]
    bars = scores_drawing(axes, panel, style)
    shown = [t.get_text() for ax in bars.figure.get_axes() for t in ax.texts]
    assert shown.count("not answered") == 1
    radar_drawing(axes, [panel], scale, style).save(tmp_path)
    with (tmp_path / "radar.csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["whole"] * 5 + ["torn"] * 4
    assert {path.name for path in tmp_path.iterdir()} == {"radar.png", "radar.svg", "radar.csv"}


def test_rings_hold_all_scores_and_their_radius_is_affine() -> None:
    assert [scale_of(z).reach for z in ([], [0.3], [2.0, -1], [-2.1])] == [2, 2, 2, 3]
    scale = scale_of([2.4, -1.0])
    assert scale.radius(3) == pytest.approx(1)
    assert 0 < scale.radius(-3) < scale.radius(-2.4)
    assert scale.radius(0) == scale.at_mean
    assert scale.radius(1) - scale.radius(0) == pytest.approx(scale.per_deviation)


def test_models_look_different_and_the_same_in_every_panel() -> None:
    style = looks([f"m{i}" for i in range(27)])
    assert len({(look.colour, look.marker, str(look.dash)) for look in style.values()}) == 27
    assert len({look.colour for look in list(style.values())[:9]}) == 9
    assert len({look.marker for look in list(style.values())[:9]}) == 9
    assert looks(["a", "b", "a"]) == {name: look for name, look in zip("ab", style.values(), strict=False)}


def test_an_axis_on_which_all_agree_says_so() -> None:
    axes = [Axis(f"b{i}", 40.0, 0.0 if i == 0 else 1.0, 2) for i in range(3)]
    panel = Panel("", {name: [Score(40.0, 0.0)] * 3 for name in "ab"})
    figure = radar_figure(axes, [panel], scale_of([0]), looks("ab"))
    assert "b0\n40.0, all alike" in [t.get_text() for t in figure.get_axes()[0].texts]
