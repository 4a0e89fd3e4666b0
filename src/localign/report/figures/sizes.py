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
from localign.report.tables.measures import BackbonePair, SizeBin, size_bins
from localign.report.tables.rows import HEAD_NAMES, MetricKey, probe_runs
from localign.results import ProbeResults

Bins = Sequence[SizeBin]
HEADER = ("backbone", "share_low", "share_high", "positives", "recall", "seeds")


def sizes_drawing(
    results: ProbeResults, pair: BackbonePair, key: MetricKey, name: str = "sizes"
) -> Drawing | None:
    """Recall by object size of two backbones, or of one if both sides are the same; None without sizes."""
    runs = probe_runs(results)
    sides = {n: size_bins(runs.get(n, ()), key) for n in dict.fromkeys((pair.before, pair.after))}
    sides = {n: bins for n, bins in sides.items() if any(b.seeds for b in bins)}
    if not sides:
        return None
    between = short_names([pair.label], 40)[0]
    if len(sides) == 2 and not pair.aligned:
        between = " and ".join(short_names(list(sides), 34))
    roles = {pair.before: "before alignment", pair.after: "after alignment"} if pair.aligned else {}
    title = f"{key.task.capitalize()} recall by object size: {between}, {HEAD_NAMES.get(key.head, key.head)}"
    figure = sizes_figure({roles.get(n, n): bins for n, bins in sides.items()}, title, key.task)
    rows = tuple(
        (n, b.low, b.high, b.positives, _mean(b), len(b.seeds)) for n, bins in sides.items() for b in bins
    )
    return Drawing(name, figure, _words(list(sides)), HEADER, rows)


@styled
def sizes_figure(sides: Mapping[str, Bins], title: str, task: str = "local") -> Figure:
    """Bars by object size, with the difference above and the number of positives below.

    Args:
        sides: Bins of one or two backbones, by display name.
        title: Title of the figure.
        task: local or global: whether positives are patches or images.
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
        for x, size in enumerate(bins):
            mean = _mean(size)
            if mean is None:
                continue
            at = x + (k - (len(sides) - 1) / 2) * width
            ax.bar(at, 100 * mean, width=width * 0.94, color=colour)
            if len(size.seeds) > 1:
                ax.plot([at] * len(size.seeds), [100 * v for v in size.seeds], **SEED_DOT)
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
    ax.set_xlabel(f"share of the image's patches that the class covers; below, positives ({unit})")
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


def _mean(size: SizeBin) -> float | None:
    return sum(size.seeds) / len(size.seeds) if size.seeds else None


def _words(names: Sequence[str]) -> Words:
    return (
        f"Recall by object size of {' and '.join(names)}.",
        "Recall over all pairs of image and class together, by the share of the image's patches that the class "
        "covers; a bin includes its upper bound and not its lower bound. Unlike in macro recall, frequent classes "
        "weigh more. An empty bin has no bar.",
    )
