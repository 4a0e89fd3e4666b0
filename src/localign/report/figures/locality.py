"""Local against global recall, the trend over backbones, and relative locality (fig. 9, left)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from localign.report.captions import Words
from localign.report.figures.drawing import (
    WIDTH,
    Drawing,
    headline,
    legend_below,
    legend_height,
    points,
    short_names,
)
from localign.report.style import ALIGNED, BASELINE, INK, MUTED, PAPER, RULE, new_figure, styled
from localign.report.tables.measures import (
    MIN_TREND,
    Estimate,
    Trend,
    chart_lines,
    estimate,
    fit_trend,
    main_source,
)
from localign.report.tables.rows import HEAD_NAMES, Grid, MetricKey, probe_runs
from localign.results import ProbeResults

_SIDE = 4.6
"""Height of the scatter, inches."""
HEADER = (
    "backbone", "label", "role", "in_trend", "local", "local_low", "local_high", "global", "global_low",
    "global_high", "relative_locality",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One backbone."""

    backbone: str
    label: str
    role: str
    """before, after, or alone (no backbone of the results is aligned)."""
    local: Estimate
    global_: Estimate


@dataclass(frozen=True)
class Locality:
    """All backbones and their trend."""

    points: tuple[Point, ...]
    fitted: frozenset[str]
    """Backbones that the trend is fitted to: all except aligned backbones."""
    trend: Trend | None
    """None for too few backbones, see :func:`~localign.report.tables.measures.fit_trend`."""

    def relative(self, point: Point) -> float | None:
        """Local recall above the trend, as a fraction; None without a trend."""
        if self.trend is None:
            return None
        return self.trend.relative_locality(point.local.value, point.global_.value)


def measure_locality(results: ProbeResults, head: str) -> Locality:
    """Local and global recall of every backbone that has both, and the trend."""
    runs, source = probe_runs(results), main_source(results)
    lines = chart_lines(results)
    paired = any(line.before and line.after for line in lines)
    found: dict[str, Point] = {}
    for line in lines:
        for backbone, role in ((line.before, "before"), (line.after, "after")):
            local, global_ = (
                estimate(runs[backbone], MetricKey(source, head, task)) if backbone else None
                for task in ("local", "global")
            )
            # A backbone from which several were aligned is still one point.
            if backbone and backbone not in found and local and global_:
                found[backbone] = Point(backbone, line.label, role if paired else "alone", local, global_)
    fitted = [p for p in found.values() if p.role != "after"]
    trend = fit_trend([(p.local.value, p.global_.value) for p in fitted])
    return Locality(tuple(found.values()), frozenset(p.backbone for p in fitted), trend)


def locality_drawing(results: ProbeResults, head: str, name: str = "locality") -> Drawing | None:
    """The scatter, with a trend for three or more backbones; None without backbones."""
    found = measure_locality(results, head)
    if not found.points:
        return None
    rows = tuple(
        (
            p.backbone, p.label, p.role, p.backbone in found.fitted,
            p.local.value, *(p.local.interval or ("", "")),
            p.global_.value, *(p.global_.interval or ("", "")), found.relative(p),
        )
        for p in found.points
    )  # fmt: skip
    title = f"Local against global recall, {HEAD_NAMES.get(head, head)}"
    return Drawing(name, locality_figure(found, title), _words(found), HEADER, rows)


def locality_grid(found: Locality) -> Grid:
    """The table of relative locality, the largest first; recall in percent, locality in points."""
    order = sorted(found.points, key=lambda p: -(found.relative(p) or 0.0))
    role = {"before": "before", "after": "after", "alone": ""}
    rows = []
    for p in order:
        relative = found.relative(p)
        label = f"{p.label}, {role[p.role]}" if role[p.role] else p.label
        difference = "–" if relative is None else points(relative)
        rows.append((label, f"{100 * p.local.value:.1f}", f"{100 * p.global_.value:.1f}", difference))
    header = ("backbone", "local recall, %", "global recall, %", "relative locality, points")
    return Grid(header, tuple(rows))


def trend_sentence(found: Locality) -> str:
    """One sentence on the trend and the backbones it is fitted to, or on why there is none."""
    count = len(found.fitted)
    aligned = count < len(found.points)
    if found.trend is None:
        if count < MIN_TREND:
            return (
                f"No trend: it needs at least {MIN_TREND} backbones{' before alignment' if aligned else ''}."
            )
        return "No trend: all backbones have the same global recall."
    return (
        f"Least squares over {count} backbones{' before alignment' if aligned else ''}: "
        f"local = {100 * found.trend.intercept:.1f} + {found.trend.slope:.2f} global, in percent. "
        "Relative locality is the distance above that line."
    ).replace("+ -", "\u2212 ")


# -- drawing ---------------------------------------------------------------------------------------------


@styled
def locality_figure(found: Locality, title: str) -> Figure:
    """The scatter with numbered backbones; beside it, the relative locality of each backbone by name.

    Without a trend, only the scatter, with names.
    """
    labels = list(dict.fromkeys(p.label for p in found.points))
    names = dict(zip(labels, short_names(labels), strict=True))
    handles = _handles(found)
    width = WIDTH if found.trend else 0.66 * WIDTH
    inches = max(_SIDE, 0.75 + 0.25 * len(labels)) if found.trend else _SIDE
    figure = new_figure(width, 0.3 + inches + legend_height(handles, width))
    headline(figure, title)
    legend_below(figure, handles)
    if found.trend is None:
        ax = figure.subplots()
        _draw_points(ax, found)
        figure.draw_without_rendering()
        _write_texts(ax, found, names)
        return figure
    grid = figure.add_gridspec(1, 2, width_ratios=(1.25, 1))
    ax, sideways = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    number = {label: str(i) for i, label in enumerate(labels, start=1)}
    _draw_locality(sideways, found, {label: f"{names[label]}  {number[label]}" for label in labels})
    _draw_points(ax, found)
    figure.draw_without_rendering()
    _write_texts(ax, found, number)
    return figure


def _colour(point: Point) -> str:
    return ALIGNED if point.role == "after" else BASELINE if point.role == "before" else ALIGNED


def _draw_points(ax: Axes, found: Locality) -> None:
    pairs: dict[str, dict[str, Point]] = {}
    for p in found.points:
        x, y = 100 * p.global_.value, 100 * p.local.value
        xerr, yerr = (_error(e) for e in (p.global_, p.local))
        ax.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor=RULE, elinewidth=1, zorder=2)
        ax.plot(
            x, y, "o", color=_colour(p), markersize=6, markeredgecolor=PAPER, markeredgewidth=0.8, zorder=4
        )
        pairs.setdefault(p.label, {})[p.role] = p
    for sides in pairs.values():
        if {"before", "after"} <= set(sides):
            ends = [(100 * sides[r].global_.value, 100 * sides[r].local.value) for r in ("before", "after")]
            arrow = {"arrowstyle": "->", "color": MUTED, "linewidth": 0.8, "shrinkA": 3, "shrinkB": 3}
            ax.annotate("", ends[1], xytext=ends[0], arrowprops=arrow, zorder=3)
    ax.margins(0.09)
    ax.autoscale_view()
    if found.trend is not None:
        left, right = ax.get_xlim()
        ys = [100 * found.trend.intercept + found.trend.slope * x for x in (left, right)]
        ax.autoscale(False)
        ax.plot([left, right], ys, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    else:
        ax.set_title(trend_sentence(found), loc="left", fontsize=8.5, color=MUTED)
    ax.set_xlabel("global macro recall, %")
    ax.set_ylabel("local macro recall, %")
    ax.set_axisbelow(True)


def _error(recall: Estimate) -> list[list[float]] | None:
    if recall.interval is None:
        return None
    low, high = recall.interval
    return [[100 * max(0, recall.value - low)], [100 * max(0, high - recall.value)]]


def _draw_locality(ax: Axes, found: Locality, names: Mapping[str, str]) -> None:
    """One line per backbone, the largest first; a pair shows both ends."""
    lines: dict[str, dict[str, float]] = {}
    for p in found.points:
        lines.setdefault(p.label, {})[p.role] = 100 * (found.relative(p) or 0.0)
    order = sorted(lines, key=lambda label: -next(iter(lines[label].values())))
    for y, label in enumerate(order):
        ends = lines[label]
        values = [0.0, *ends.values()] if len(ends) == 1 else list(ends.values())
        ax.plot([min(values), max(values)], [y, y], color=RULE, linewidth=2.5, zorder=1)
        for role, value in ends.items():
            ax.plot(
                value, y, "o", color=BASELINE if role == "before" else ALIGNED,
                markersize=8.5 if role == "before" else 6.5, markeredgecolor=PAPER, markeredgewidth=0.8, zorder=3,
            )  # fmt: skip
        if len(ends) == 1:
            (value,) = ends.values()
            shift = 7 if value >= 0 else -7
            ax.annotate(
                points(value / 100), (value, y), xytext=(shift, 0), textcoords="offset points", va="center",
                ha="left" if value >= 0 else "right", fontsize=7.5,
            )  # fmt: skip
    ax.axvline(0, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=0)
    ax.margins(x=0.2)
    ax.set_yticks(range(len(order)), [names[label] for label in order], color=INK)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.set_axisbelow(True)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("relative locality: local recall above the trend, points")


def _write_texts(ax: Axes, found: Locality, texts: Mapping[str, str]) -> None:
    """Write numbers or names beside their points, where they cover neither a point nor another text."""
    scale = 72 / ax.figure.dpi
    places = {
        id(p): ax.transData.transform((100 * p.global_.value, 100 * p.local.value)) * scale
        for p in found.points
    }
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in places.values()]
    written: set[str] = set()
    for p in found.points:
        if p.label in written:  # an arrow leads to the second point of the same backbone
            continue
        written.add(p.label)
        text = texts[p.label]
        size = (5.2 * len(text), 8.0)
        offset = free_offset(places[id(p)], size, boxes)
        x, y = places[id(p)] + offset
        boxes.append((x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2))
        leader = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        ax.annotate(
            text, (100 * p.global_.value, 100 * p.local.value), xytext=(offset[0], offset[1]),
            textcoords="offset points", ha="center", va="center", fontsize=7.5, zorder=5,
            arrowprops=leader if math.hypot(*offset) > 14 else None,
            path_effects=[withStroke(linewidth=2, foreground=PAPER)],
        )  # fmt: skip


def free_offset(
    point: NDArray[np.float64],
    size: tuple[float, float],
    boxes: Sequence[tuple[float, float, float, float]],
) -> NDArray[np.float64]:
    """The offset from a point at which a box touches no other box.

    Searches rings of growing radius and returns the first free offset; if none is free, the first offset.

    Args:
        point: ``(2,)``.
        size: Width and height of the box, in the unit of ``point``.
        boxes: Left, bottom, right and top of the other boxes, in the same unit.

    Returns:
        ``(2,)``, from the point to the centre of the box.
    """
    width, height = size
    tried = []
    for radius in (9.0, 12.0, 16.0, 21.0, 27.0):
        for angle in np.deg2rad([45, 135, 315, 225, 90, 270, 0, 180, 22, 158, 338, 202]):
            offset = np.array([np.cos(angle), np.sin(angle)]) * radius
            x, y = point + offset
            candidate = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            if not any(_touch(candidate, box) for box in boxes):
                return offset
            tried.append(offset)
    return tried[0]


def _touch(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _handles(found: Locality) -> list[Any]:
    roles = {p.role for p in found.points}
    named = (("before", "before alignment"), ("after", "after alignment"), ("alone", "backbone"))
    handles: list[Any] = [
        Line2D([], [], linestyle="none", marker="o", markersize=6, label=label,
               color=BASELINE if role == "before" else ALIGNED)
        for role, label in named
        if role in roles
    ]  # fmt: skip
    if found.trend is not None:
        fitted = len(found.fitted)
        handles.append(
            Line2D(
                [],
                [],
                color=INK,
                linewidth=1.2,
                linestyle=(0, (5, 3)),
                label=f"trend over {fitted} backbones",
            )
        )
    if any(p.local.interval for p in found.points):
        handles.append(Line2D([], [], color=RULE, linewidth=1.4, label="95 % bootstrap interval over images"))
    if found.trend is not None:
        handles.append(Patch(facecolor="none", edgecolor="none", label="numbers: see the names at the right"))
    return handles


def _words(found: Locality) -> Words:
    return (
        "Scatter of local against global macro recall with a fitted line, and bars of relative locality.",
        f"Local against global recall of {len(found.points)} backbones. {trend_sentence(found)} Arrows lead "
        "from a backbone before alignment to the same backbone after it.",
    )
