"""Recall by object size (fig. 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from localign.report.captions import Words
from localign.report.figures.classes import compact
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
from localign.report.style import ALIGNED, BASELINE, INK, MUTED, new_figure, styled
from localign.report.tables.measures import BackbonePair, Measured, SizeBin, size_bins
from localign.report.tables.rows import HEAD_NAMES, probe_runs

Bins = Sequence[SizeBin]
HEADER = ("backbone", "share_low", "share_high", "positives", "recall", "seeds")


def sizes_drawing(
    results: Mapping[str, Any], pair: BackbonePair, what: Measured, name: str = "sizes"
) -> Drawing | None:
    """Recall per object size of two backbones, or of one compared with itself; None without sizes."""
    runs = probe_runs(results)
    sides = {n: size_bins(runs.get(n, ()), what) for n in dict.fromkeys((pair.before, pair.after))}
    sides = {n: bins for n, bins in sides.items() if any(b.seeds for b in bins)}
    if not sides:
        return None
    between = short_names([pair.label], 40)[0]
    if len(sides) == 2 and not pair.aligned:
        between = " and ".join(short_names(list(sides), 34))
    roles = {pair.before: "before alignment", pair.after: "after alignment"} if pair.aligned else {}
    title = (
        f"{what.task.capitalize()} recall by object size: {between}, {HEAD_NAMES.get(what.head, what.head)}"
    )
    figure = sizes_figure({roles.get(n, n): bins for n, bins in sides.items()}, title, what.task)
    rows = tuple(
        (n, b.low, b.high, b.positives, _mean(b), len(b.seeds)) for n, bins in sides.items() for b in bins
    )
    return Drawing(name, figure, _words(list(sides)), HEADER, rows)


@styled
def sizes_figure(sides: Mapping[str, Bins], title: str, task: str = "local") -> Figure:
    """Bars per object size, the difference above them and the number of positives below.

    Args:
        sides: One or two backbones' bins.
        title: Of the whole.
        task: What was predicted, local or global: what a positive is.
    """
    colours = (BASELINE, ALIGNED) if len(sides) == 2 else (ALIGNED,)
    names = short_names(list(sides), 40)
    several = any(len(b.seeds) > 1 for bins in sides.values() for b in bins)
    handles: list[Any] = [Patch(facecolor=c, label=n) for n, c in zip(names, colours, strict=True)]
    handles += [seeds_handle()] if several else []
    figure = new_figure(WIDTH, 3.5 + legend_height(handles))
    headline(figure, title)
    legend_below(figure, handles)
    ax = figure.subplots()
    width = 0.8 / len(sides)
    for k, (bins, colour) in enumerate(zip(sides.values(), colours, strict=True)):
        for x, found in enumerate(bins):
            mean = _mean(found)
            if mean is None:
                continue
            at = x + (k - (len(sides) - 1) / 2) * width
            ax.bar(at, 100 * mean, width=width * 0.94, color=colour)
            if len(found.seeds) > 1:
                ax.plot([at] * len(found.seeds), [100 * v for v in found.seeds], **SEED_DOT)
    columns = list(zip(*sides.values(), strict=True))
    for x, column in enumerate(columns):
        means = [_mean(b) for b in column]
        top = 100 * max([0.0, *(v for b in column for v in (*b.seeds, _mean(b) or 0))])
        if len(means) == 2 and means[0] is not None and means[1] is not None:
            label = points(means[1] - means[0])
        else:
            label = next((f"{100 * m:.1f}" for m in means if m is not None), "none")
        ax.annotate(
            label, (x, top), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8.5,
            color=MUTED if label == "none" else INK,
        )  # fmt: skip
    unit = "patches" if task == "local" else "images"
    ticks = [f"{100 * b.low:.0f}–{100 * b.high:.0f} %\n{compact(b.positives)}" for b, *_ in columns]
    ax.set_xticks(range(len(columns)), ticks)
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel(f"share of the image's patches that the class covers; below it, positives ({unit})")
    ax.set_ylabel("recall, %")
    ax.set_axisbelow(True)
    ax.grid(visible=False, axis="x")
    ax.set_xlim(-0.6, len(columns) - 0.4)
    ax.margins(y=0.12)
    ax.set_ylim(bottom=0)
    ax.set_yticks(
        [t for t in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(*ax.get_ylim()) if 0 <= t <= 100]
    )
    ax.set_ylim(0, ax.dataLim.y1 * 1.14)
    if len(sides) == 2:
        ax.set_title("above the bars: difference, points", loc="left", fontsize=8.5, color=MUTED)
    return figure


def _mean(found: SizeBin) -> float | None:
    return sum(found.seeds) / len(found.seeds) if found.seeds else None


def _words(names: Sequence[str]) -> Words:
    return (
        f"Recall by object size of {' and '.join(names)}.",
        "Recall of all pairs of image and class together, by the share of the image's patches that the class "
        "covers: bins hold shares above their lower and up to their upper bound. Unlike macro recall, "
        "frequent classes weigh more here. An empty bin has no bar.",
    )
