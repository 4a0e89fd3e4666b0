"""What the transformer head loses where it may not see which patch is which (fig. 9, right)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from localign.report.tables.measures import Estimate, Measured, display_names, estimate, main_source
from localign.report.tables.rows import probe_runs

LOOKS = {
    "transformer": ("all tokens", "o", CATEGORICAL[0]),
    "transformer-anonymous": ("anonymous tokens", "D", CATEGORICAL[1]),
    "transformer-cls-only": ("class token (or mean) only", "s", CATEGORICAL[2]),
}
"""Head label to its words, marker and colour."""
HEADER = ("backbone", "head", "macro_recall", "low", "high", "seeds")
Line = Mapping[str, Estimate]


def interventions_drawing(results: Mapping[str, Any], name: str = "interventions") -> Drawing | None:
    """Local recall with and without interventions; None where no backbone has one of them beside the head."""
    source = main_source(results)
    lines: dict[str, dict[str, Estimate]] = {}
    shown = display_names(results)
    for backbone, runs in probe_runs(results).items():
        found = {head: estimate(runs, Measured(source, head, "local")) for head in LOOKS}
        known = {head: value for head, value in found.items() if value is not None}
        if len(known) > 1:
            lines[backbone] = known
    if not lines:
        return None
    rows = tuple(
        (backbone, head, e.value, *(e.interval or ("", "")), len(e.seeds))
        for backbone, line in lines.items()
        for head, e in line.items()
    )
    figure = interventions_figure({shown[n]: line for n, line in lines.items()})
    return Drawing(name, figure, _WORDS, HEADER, rows)


@styled
def interventions_figure(lines: Mapping[str, Line]) -> Figure:
    """One line per backbone, one marker per intervention.

    Args:
        lines: Backbone to head label to local recall.
    """
    heads = [h for h in LOOKS if any(h in line for line in lines.values())]
    estimates = [e for line in lines.values() for e in line.values()]
    handles: list[Any] = [
        Line2D([], [], linestyle="none", marker=marker, color=colour, markersize=6.5, label=words)
        for words, marker, colour in (LOOKS[h] for h in heads)
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


def _draw_markers(ax: Any, y: int, line: Line) -> None:
    for head, found in line.items():
        _, marker, colour = LOOKS[head]
        value = 100 * found.value
        if found.interval is not None:
            low, high = (100 * b for b in found.interval)
            ax.errorbar(value, y, xerr=[[max(0, value - low)], [max(0, high - value)]], zorder=2, **WHISKER)
        ax.plot(
            value, y, marker=marker, color=colour, markersize=7, markeredgecolor=PAPER, markeredgewidth=0.8,
            zorder=3,
        )  # fmt: skip


_WORDS: Words = (
    "Local macro recall of every backbone with all tokens, with anonymous tokens, and with the class token "
    "alone.",
    "What interventions on the transformer head cost. Anonymous: the head gets all tokens without being told "
    "where they come from, and predicts through separate learned latent tokens, one per patch. Class token: "
    "it gets nothing but that (the mean of all tokens where there is none). What is lost against all tokens "
    "is what the patch embeddings say about their own place.",
)
