"""The loss of the transformer head when it gets fewer tokens (fig. 9, right)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from localign.report.captions import Words
from localign.report.figures.drawing import (
    WHISKER,
    WIDTH,
    Drawing,
    headline,
    legend_below,
    legend_height,
    short_names,
    whisker_handle,
)
from localign.report.style import CATEGORICAL, INK, PAPER, RULE, new_figure, styled
from localign.report.tables.measures import Estimate, display_names, estimate, main_source
from localign.report.tables.rows import MetricKey, probe_runs
from localign.results import ProbeResults

LOOKS = {
    "transformer": ("all tokens", "o", CATEGORICAL[0]),
    "transformer-anonymous": ("anonymous tokens", "D", CATEGORICAL[1]),
    "transformer-cls-only": ("class token (or mean) only", "s", CATEGORICAL[2]),
}
"""Head to its label, marker and colour."""
HEADER = ("backbone", "head", "macro_recall", "low", "high", "seeds")
HeadRecalls = Mapping[str, Estimate]
"""Local recall of one backbone, by head."""


def interventions_drawing(results: ProbeResults, name: str = "interventions") -> Drawing | None:
    """Local recall with and without interventions; None where no backbone has two of the heads."""
    source = main_source(results)
    lines: dict[str, dict[str, Estimate]] = {}
    names = display_names(results)
    for backbone, outcomes in probe_runs(results).items():
        recalls = {head: estimate(outcomes, MetricKey(source, head, "local")) for head in LOOKS}
        known = {head: recall for head, recall in recalls.items() if recall is not None}
        if len(known) > 1:
            lines[backbone] = known
    if not lines:
        return None
    rows = tuple(
        (backbone, head, e.value, *(e.interval or ("", "")), len(e.seeds))
        for backbone, line in lines.items()
        for head, e in line.items()
    )
    figure = interventions_figure({names[n]: line for n, line in lines.items()})
    return Drawing(name, figure, _WORDS, HEADER, rows)


@styled
def interventions_figure(lines: Mapping[str, HeadRecalls]) -> Figure:
    """One line per backbone, one marker per head.

    Args:
        lines: By the backbone's display name.
    """
    heads = [h for h in LOOKS if any(h in line for line in lines.values())]
    estimates = [e for line in lines.values() for e in line.values()]
    handles: list[Any] = [
        Line2D([], [], linestyle="none", marker=marker, color=colour, markersize=6.5, label=label)
        for label, marker, colour in (LOOKS[h] for h in heads)
    ]
    handles += [whisker_handle()] if any(e.interval for e in estimates) else []
    figure = new_figure(WIDTH * 0.78, 0.95 + 0.27 * len(lines) + legend_height(handles, WIDTH * 0.78))
    headline(figure, "Local recall when the head sees less: interventions on the transformer head")
    legend_below(figure, handles)
    ax = figure.subplots()
    for y, line in enumerate(lines.values()):
        values = [100 * e.value for e in line.values()]
        ax.plot([min(values), max(values)], [y, y], color=RULE, linewidth=2.5, zorder=1)
        _draw_markers(ax, y, line)
    ax.set_yticks(range(len(lines)), short_names(list(lines)), color=INK)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.margins(x=0.05)
    if ax.get_xlim()[0] < 0.5 * ax.get_xlim()[1]:
        ax.set_xlim(left=0)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("local macro recall, %")
    return figure


def _draw_markers(ax: Axes, y: int, line: HeadRecalls) -> None:
    for head, recall in line.items():
        _, marker, colour = LOOKS[head]
        value = 100 * recall.value
        if recall.interval is not None:
            low, high = (100 * b for b in recall.interval)
            ax.errorbar(value, y, xerr=[[max(0, value - low)], [max(0, high - value)]], zorder=2, **WHISKER)
        ax.plot(
            value, y, marker=marker, color=colour, markersize=7, markeredgecolor=PAPER, markeredgewidth=0.8,
            zorder=3,
        )  # fmt: skip


_WORDS: Words = (
    "Local macro recall of every backbone with all tokens, with anonymous tokens, and with the class token "
    "alone.",
    "What interventions on the transformer head cost. Anonymous: the head gets all tokens without their positions, "
    "and predicts through separate learned latent tokens, one per patch. Class token: the head gets the class token "
    "only (the mean of all tokens in a backbone without one). The loss against all tokens measures how much the "
    "patch embeddings say about their own place.",
)
