"""Radar charts of benchmarks: each axis is scaled by the mean and deviation of the models compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from localign.report.captions import Words
from localign.report.figures.drawing import (
    WIDTH,
    Drawing,
    headline,
    legend_below,
    legend_height,
    short_names,
)
from localign.report.style import ALIGNED, BASELINE, MUTED, PAPER, RULE, new_figure, styled
from localign.text.printing import plain_mathtext

FEWEST = 3
"""Axes that a radar needs."""
INNERMOST = 0.1
"""Radius of the innermost ring; above 0, so that models there stay apart from the centre."""
_ONE_PANEL_WIDTH = 7.6
"""Width of a figure with one panel, inches."""
_HALF_WIDTH, _ASPECT = 1.62, 0.76
"""Half a panel's width in radii of the outermost ring, with room for names; and a panel's height over its width."""
COLOURS = (BASELINE, ALIGNED, "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F5AA8", "#8C6D46", "#4D4D4D")
MARKERS = "osD^vPX*<"
"""Colour-blind readers can tell the colours apart; markers help everybody."""
DASHES = ("-", (0, (4, 1.6)), (0, (1.2, 1.2)))
"""Line styles; the next one is used once all colours are."""
HEADER = (
    "panel", "axis", "model", "value", "mean", "population_deviation", "models_on_axis", "z", "radius",
    "radius_at_mean", "radius_per_deviation",
)  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """One metric of a benchmark and its spread over the models compared."""

    label: str
    mean: float
    """Percent."""
    deviation: float
    """Population standard deviation (divided by n), percentage points."""
    models: int
    """Number of models that have the metric."""


@dataclass(frozen=True)
class Score:
    """One model on one axis, in percent."""

    value: float
    z: float
    """Distance from the axis's mean in standard deviations; 0 where all models agree."""
    interval: tuple[float, float] | None = None
    """95 % interval over images, percent."""
    seeds: tuple[float, ...] = ()
    """The value of each training seed."""
    difference: float | None = None
    """Difference to the first model of the panel, percentage points."""
    significant: bool = False
    """Whether the 95 % interval of the difference over images excludes 0."""


@dataclass(frozen=True)
class Panel:
    """Models to compare."""

    title: str
    models: Mapping[str, Sequence[Score | None]]
    """By name, one score per axis; None where the model did not answer the benchmark."""


@dataclass(frozen=True)
class Scale:
    """From z-score to radius: ``radius = at_mean + per_deviation * z``, which is 1 at the outermost ring."""

    reach: int
    """z-score of the outermost ring; the innermost ring has its negative."""

    @property
    def per_deviation(self) -> float:
        """Radius of one standard deviation."""
        return (1 - INNERMOST) / (2 * self.reach)

    @property
    def at_mean(self) -> float:
        """Radius of the pool's mean."""
        return (1 + INNERMOST) / 2

    def radius(self, z: float) -> float:
        """Radius of a z-score, 0..1."""
        return self.at_mean + self.per_deviation * z


def scale_of(scores: Sequence[float]) -> Scale:
    """The scale whose rings hold all z-scores; they reach a whole number of deviations, at least 2."""
    return Scale(max(2, math.ceil(max((abs(z) for z in scores), default=0) - 1e-9)))


@dataclass(frozen=True)
class LineLook:
    """The look of a model's line."""

    colour: str
    marker: str
    dash: Any


def looks(names: Sequence[str]) -> dict[str, LineLook]:
    """A look for each name; the first two have the report's colours of before and after."""
    count = len(COLOURS)
    return {
        name: LineLook(
            COLOURS[i % count],
            MARKERS[(i + i // count) % len(MARKERS)],
            DASHES[(i // count) % len(DASHES)],
        )
        for i, name in enumerate(dict.fromkeys(names))
    }


def radar_drawing(
    axes: Sequence[Axis],
    panels: Sequence[Panel],
    scale: Scale,
    style: Mapping[str, LineLook],
    name: str = "radar",
) -> Drawing:
    """All panels in one figure; its data hold the scaling of every axis.

    Args:
        axes: At least three.
        panels: Models with one score per axis.
        scale: The scale of all panels, which makes them comparable.
        style: Looks by model.
        name: Name of the files.
    """
    figure = radar_figure(axes, panels, scale, style)
    rows = tuple(
        (
            panel.title, axis.label, model, score.value, axis.mean, axis.deviation, axis.models, score.z,
            scale.radius(score.z), scale.at_mean, scale.per_deviation,
        )
        for panel in panels
        for model, scores in panel.models.items()
        for axis, score in zip(axes, scores, strict=True)
        if score is not None
    )  # fmt: skip
    return Drawing(name, figure, _WORDS, HEADER, rows)


@styled
def radar_figure(
    axes: Sequence[Axis], panels: Sequence[Panel], scale: Scale, style: Mapping[str, LineLook]
) -> Figure:
    """Panels side by side, two in a row; see :func:`radar_drawing`."""
    models = list(dict.fromkeys(model for panel in panels for model in panel.models))
    handles: list[Any] = [
        Line2D([], [], label=name, **_line(style[model]))
        for model, name in zip(models, short_names(models, 40), strict=True)
    ]
    handles.append(Patch(facecolor="none", edgecolor="none", label="under names: mean ± deviation, %"))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width = WIDTH if columns > 1 else _ONE_PANEL_WIDTH
    titles = 0.3 if any(panel.title for panel in panels) else 0
    figure = new_figure(
        width, (_ASPECT * width / columns + titles) * rows + 0.4 + legend_height(handles, width)
    )
    headline(figure, "Benchmarks, in standard deviations from the mean of the models compared")
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, panel in zip(grid.flat, panels, strict=False):
        _draw_web(ax, axes, scale)
        for model, scores in panel.models.items():
            _draw_model(ax, scores, scale, style[model])
        if panel.title:
            ax.set_title(plain_mathtext(panel.title), fontweight="bold", pad=9)
    legend_below(figure, handles)
    return figure


def _line(look: LineLook) -> dict[str, Any]:
    return {
        "color": look.colour, "linestyle": look.dash, "marker": look.marker, "markersize": 4.6,
        "markeredgecolor": PAPER, "markeredgewidth": 0.5, "linewidth": 1.5,
    }  # fmt: skip


def _directions(count: int) -> NDArray[np.float64]:
    """Unit vectors ``(count, 2)``, clockwise from the top."""
    angles = math.pi / 2 - 2 * math.pi * np.arange(count) / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _draw_web(ax: Axes, axes: Sequence[Axis], scale: Scale) -> None:
    directions = _directions(len(axes))
    ring = np.concatenate([directions, directions[:1]])
    for z in range(-scale.reach, scale.reach + 1):
        heavy = {"color": MUTED, "linewidth": 1.0} if z == 0 else {"color": RULE, "linewidth": 0.8}
        ax.plot(*(scale.radius(z) * ring).T, zorder=1, **heavy)  # type: ignore[arg-type]
        # Halfway between the first axis and the second there is no marker.
        x, y = scale.radius(z) * (directions[0] + directions[1]) / 2
        ax.text(x, y, "mean" if z == 0 else f"{z:+d}".replace("-", "\u2212"), fontsize=6.5, color=MUTED,
                ha="center", va="center", zorder=4,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.8})  # fmt: skip
    names = short_names([axis.label for axis in axes], 24)
    for (x, y), axis, label in zip(directions, axes, names, strict=True):
        ax.plot([0, x], [0, y], color=RULE, linewidth=0.8, zorder=1)
        across = "center" if abs(x) < 0.1 else ("left" if x > 0 else "right")
        up = "bottom" if y > 0.85 else ("top" if y < -0.85 else "center")
        spread = (
            f"{axis.mean:.1f} ± {axis.deviation:.1f}" if axis.deviation > 0 else f"{axis.mean:.1f}, all alike"
        )
        ax.text(1.07 * x, 1.07 * y, f"{label}\n{spread}", ha=across, va=up, fontsize=7.5, linespacing=1.15)
    ax.set_xlim(-_HALF_WIDTH, _HALF_WIDTH)
    ax.set_ylim(-_ASPECT * _HALF_WIDTH, _ASPECT * _HALF_WIDTH)
    ax.set_aspect("equal")
    ax.set_axis_off()


def _draw_model(ax: Axes, scores: Sequence[Score | None], scale: Scale, look: LineLook) -> None:
    """A line from axis to axis, with a gap where a benchmark is missing."""
    directions = _directions(len(scores))
    points = [
        None if score is None else scale.radius(score.z) * direction
        for score, direction in zip(scores, directions, strict=True)
    ]
    for start, end in pairwise([*points, points[0]]):
        if start is not None and end is not None:
            ax.plot(*np.stack([start, end]).T, **(_line(look) | {"marker": "none", "zorder": 2}))
    known = [point for point in points if point is not None]
    if known:
        ax.plot(*np.stack(known).T, **(_line(look) | {"linestyle": "none", "zorder": 3}))


_WORDS: Words = (
    "Radar charts of benchmarks, one line per model, each axis in standard deviations from the pool's mean.",
    "Every axis is scaled by the mean and the population standard deviation over the models compared, both in percent "
    "under its name; rings are standard deviations from the mean. So equal distances are not equal gains, and the "
    "picture changes with the models compared: the bars show the same metrics in percent, with intervals. A gap is a "
    "benchmark that a model did not answer.",
)
