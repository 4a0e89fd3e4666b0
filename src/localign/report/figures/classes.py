"""Gains by class (fig. 7): all classes in order of gain, and the classes that gained most by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from localign.report.captions import Words
from localign.report.figures.drawing import (
    SEED_DOT,
    WIDTH,
    Drawing,
    headline,
    legend_below,
    legend_height,
    points,
    seeds_handle,
    short_names,
)
from localign.report.style import CATEGORICAL, INK, MUTED, RULE, new_figure, styled
from localign.report.tables.measures import KINDS, BackbonePair, ClassGain, class_gains
from localign.report.tables.rows import HEAD_NAMES, MetricKey
from localign.results import ProbeResults
from localign.text.printing import plain_mathtext

TOP = 10
_NAMED = 24
"""Up to this number of classes, all are shown by name."""
_COLOURS = {"thing": CATEGORICAL[0], "stuff": CATEGORICAL[1], "other": CATEGORICAL[9]}
_UNKNOWN = CATEGORICAL[0]
HEADER = ("class_id", "class", "kind", "positives", "before", "after", "gain")


def classes_drawing(
    results: ProbeResults, pair: BackbonePair, key: MetricKey, name: str = "classes"
) -> Drawing | None:
    """Gains of every class between two backbones; None where no class was measured on both."""
    gains = class_gains(results, pair, key)
    if not gains:
        return None
    unit = "images" if key.task == "global" else "patches"
    names = short_names([pair.before, pair.after], 40)
    between = short_names([pair.label], 40)[0] if pair.aligned else f"{names[1]} against {names[0]}"
    title = f"Gain in {key.task} recall by class: {between}, {HEAD_NAMES.get(key.head, key.head)}"
    rows = tuple((g.index, g.name, g.kind, g.positives, g.before, g.after, g.gain) for g in gains)
    return Drawing(name, classes_figure(gains, title, unit), _words(gains), HEADER, rows)


@styled
def classes_figure(gains: Sequence[ClassGain], title: str, unit: str = "patches") -> Figure:
    """All classes in order of gain; below, the ten things and the ten stuff classes that gained most.

    Where kinds are unknown, the ten classes that gained most and the ten that gained least. Up to 24 classes are all
    shown by name instead.

    Args:
        gains: In order of gain, the largest first.
        title: Title of the figure.
        unit: Unit of a class's positives, patches or images.
    """
    lists = _lists(gains)
    longest = max(len(part) for _, part in lists)
    handles = _handles(gains, unit)
    bottom = 0.75 + 0.215 * longest
    top = 0.0 if len(gains) <= _NAMED else 2.3
    figure = new_figure(WIDTH, 0.4 + top + bottom + legend_height(handles))
    headline(figure, title)
    legend_below(figure, handles)
    named: FigureBase = figure
    if top:
        upper, named = figure.subfigures(2, 1, height_ratios=(top, bottom), squeeze=False)[:, 0]
        _draw_all(upper.subplots(), gains)
    axes = named.subplots(1, len(lists), squeeze=False)[0]
    bounds = _bounds([g for _, part in lists for g in part])
    for ax, (heading, part) in zip(axes, lists, strict=True):
        _draw_named(ax, part, heading, bounds, longest)
    return figure


def _lists(gains: Sequence[ClassGain]) -> list[tuple[str, Sequence[ClassGain]]]:
    if len(gains) <= _NAMED:
        return [(f"all {len(gains)} classes", gains)]
    by_kind = [(kind, [g for g in gains if g.kind == kind][:TOP]) for kind in KINDS]
    if any(part for _, part in by_kind):
        plural = {"thing": "things", "stuff": "stuff"}
        return [(f"most improved {plural[kind]}", part) for kind, part in by_kind if part]
    return [("most improved classes", gains[:TOP]), ("least improved classes", gains[-TOP:])]


def _draw_all(ax: Axes, gains: Sequence[ClassGain]) -> None:
    values = [100 * g.gain for g in gains]
    ax.bar(range(len(gains)), values, width=0.86, color=[_colour(g) for g in gains])
    ax.axhline(0, color=INK, linewidth=0.8)
    mean = float(np.mean(values))
    ax.axhline(mean, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    ax.annotate(
        f"mean over classes {points(mean / 100)}", (1, mean), xycoords=("axes fraction", "data"),
        xytext=(0, 3), textcoords="offset points", ha="right", va="bottom", fontsize=8, color=MUTED,
    )  # fmt: skip
    ax.set_xlim(-1, len(gains))
    ax.set_xticks([])
    ax.set_xlabel("")
    ax.set_axisbelow(True)
    ax.grid(visible=False, axis="x")
    risen = sum(g.gain > 0 for g in gains)
    ax.set_title(
        f"all {len(gains)} classes by gain: {risen} gained, {len(gains) - risen} did not", loc="left"
    )
    ax.set_ylabel("gain, points")


def _draw_named(
    ax: Axes, gains: Sequence[ClassGain], heading: str, bounds: tuple[float, float], lines: int
) -> None:
    places = range(len(gains))
    ax.barh(places, [100 * g.gain for g in gains], height=0.72, color=[_colour(g) for g in gains])
    low, high = bounds
    pad = 0.012 * (high - low)
    for y, gain in enumerate(gains):
        ends = [100 * v for v in (gain.gain, *gain.seeds)]
        if len(gain.seeds) > 1:
            ax.plot(ends[1:], [y] * len(gain.seeds), **SEED_DOT)
        right = gain.gain >= 0
        ax.text(
            max(0, *ends) + pad if right else min(0, *ends) - pad, y, points(gain.gain),
            ha="left" if right else "right", va="center", fontsize=7.5,
        )  # fmt: skip
    ax.axvline(0, color=INK, linewidth=0.8)
    labels = [
        f"{name}  ({compact(g.positives)})"
        for name, g in zip(short_names([g.name for g in gains], 28), gains, strict=True)
    ]
    ax.set_yticks(places, labels, color=INK)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(lines - 0.4, -0.6)
    ax.set_xlim(low, high)
    ax.set_axisbelow(True)
    ax.grid(visible=False, axis="y")
    ax.set_title(plain_mathtext(heading), loc="left")
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.set_xlabel("gain in recall, points")


def _bounds(gains: Sequence[ClassGain]) -> tuple[float, float]:
    """Axis limits that hold for all lists, with room for the numbers."""
    values = [100 * v for g in gains for v in (g.gain, *g.seeds)]
    low, high = min(0.0, *values), max(0.0, *values)
    span = max(high - low, 1e-3)
    return low - (0.13 * span if low < 0 else 0), high + (0.13 * span if high > 0 else 0.02 * span)


def compact(number: int) -> str:
    """A count in a few characters: 9,876 or 12k or 3.4M."""
    if number < 10_000:
        return f"{number:,}"
    return f"{number / 1e3:.0f}k" if number < 999_500 else f"{number / 1e6:.1f}M"


def _colour(gain: ClassGain) -> str:
    return _COLOURS.get(gain.kind, _UNKNOWN)


def _handles(gains: Sequence[ClassGain], unit: str) -> list[Any]:
    kinds = [k for k in _COLOURS if any(g.kind == k for g in gains)]
    plural = {"thing": "things", "stuff": "stuff", "other": "other classes"}
    handles: list[Any] = [Patch(facecolor=_COLOURS[k], edgecolor=RULE, label=plural[k]) for k in kinds]
    if any(len(g.seeds) > 1 for g in gains):
        handles.append(seeds_handle())
    label = f"in brackets: {unit} with the class"
    if not kinds and len(gains) > _NAMED:
        label = f"kinds of classes unknown; {label}"
    return [*handles, Patch(facecolor="none", edgecolor="none", label=label)]


def _words(gains: Sequence[ClassGain]) -> Words:
    known = any(g.kind in KINDS for g in gains)
    most = (
        f"the {TOP} things and {TOP} stuff classes that gained most"
        if known
        else "the classes that gained most"
    )
    if len(gains) <= _NAMED:
        most = "each by its name"
    return (
        f"Bars of the gain in recall of {len(gains)} classes, sorted; {most}.",
        f"Gain in recall by class, in points; {most}. Classes without positives are left out. Single classes have no "
        "interval here, and rare classes vary by chance: the number of positives is in brackets.",
    )
