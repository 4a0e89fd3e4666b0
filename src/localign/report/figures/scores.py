"""Bars of benchmarks in percent, with intervals: the metrics of a radar chart without its scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from localign.report.captions import Words
from localign.report.figures.drawing import (
    SEED_DOT,
    WHISKER,
    WIDTH,
    Drawing,
    headline,
    legend_below,
    legend_height,
    points,
    seeds_handle,
    short_names,
    whisker_handle,
)
from localign.report.figures.radar import DASHES, Axis, LineLook, Panel, Score
from localign.report.style import INK, MUTED, PAPER, new_figure, styled
from localign.text.printing import plain_mathtext

_BAR, _GAP, _FRAME = 0.17, 0.16, 1.05
"""Heights in inches: of a bar, between benchmarks, of titles and axis together."""
_HATCHES = dict(zip(map(str, DASHES), ("", "////", "xxxx"), strict=True))
"""By line style of the radar: bars are hatched where its lines are dashed."""
HEADER = (
    "panel", "axis", "model", "value", "low", "high", "seeds", "difference", "certain",
)  # fmt: skip


def scores_drawing(
    axes: Sequence[Axis], panel: Panel, style: Mapping[str, LineLook], name: str = "bars"
) -> Drawing:
    """The models of one panel on every benchmark.

    Args:
        axes: Metrics of the benchmarks.
        panel: Models with one score per axis.
        style: Looks by model.
        name: Name of the files.
    """
    rows = tuple(
        (
            panel.title, axis.label, model, score.value, *(score.interval or (None, None)), len(score.seeds),
            score.difference, "" if score.difference is None else score.significant,
        )
        for axis, column in zip(axes, zip(*panel.models.values(), strict=True), strict=True)
        for model, score in zip(panel.models, column, strict=True)
        if score is not None
    )  # fmt: skip
    return Drawing(name, scores_figure(axes, panel, style), _words(len(panel.models) > 1), HEADER, rows)


@styled
def scores_figure(axes: Sequence[Axis], panel: Panel, style: Mapping[str, LineLook]) -> Figure:
    """Horizontal bars, one group per benchmark, in two columns if there are many."""
    models = list(panel.models)
    group = _BAR * len(models) + _GAP
    columns = 2 if len(axes) > 1 and group * len(axes) > 2.4 else 1
    rows = -(-len(axes) // columns)
    handles = _handles(panel, style)
    figure = new_figure(WIDTH, _FRAME + group * rows + legend_height(handles))
    headline(figure, plain_mathtext(panel.title) or "Benchmarks")
    grid = figure.subplots(1, columns, squeeze=False)[0]
    names = short_names([axis.label for axis in axes], 24)
    groups = list(zip(names, zip(*panel.models.values(), strict=True), strict=True))
    for k, ax in enumerate(grid):
        own = groups[k * rows : (k + 1) * rows]
        for i, (_, column) in enumerate(own):
            for j, (model, score) in enumerate(zip(models, column, strict=True)):
                _draw_bar(ax, i * group + _GAP / 2 + (j + 0.5) * _BAR, score, style[model])
        centres = [i * group + group / 2 for i in range(len(own))]
        ax.set_yticks(centres, [name for name, _ in own], color=INK)
        ax.set_ylim(group * rows, 0)
        ax.set_xlim(0, 138 if len(models) > 1 else 116)
        ax.set_xticks(range(0, 101, 20))
        ax.set_xlabel("percent")
        ax.set_axisbelow(True)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        if len(models) > 1:
            ax.set_title("difference, points", loc="right", fontsize=8, color=MUTED)
    legend_below(figure, handles)
    return figure


def _draw_bar(ax: Axes, y: float, score: Score | None, look: LineLook) -> None:
    if score is None:
        ax.text(1, y, "not answered", va="center", fontsize=6.5, color=MUTED, style="italic")
        return
    ax.barh(y, score.value, height=0.88 * _BAR, **_fill(look))
    end = score.value
    if score.interval is not None:
        low, high = score.interval
        ax.errorbar(
            score.value, y, xerr=[[max(0, score.value - low)], [max(0, high - score.value)]], **WHISKER
        )
        end = max(end, high)
    if len(score.seeds) > 1:
        ax.plot(score.seeds, [y] * len(score.seeds), **SEED_DOT)
        end = max(end, *score.seeds)
    ax.annotate(
        f"{score.value:.1f}", (end, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7
    )
    if score.difference is not None:
        ax.text(
            0.995, y, points(score.difference / 100), transform=ax.get_yaxis_transform(), ha="right",
            va="center", fontsize=7, fontweight="bold" if score.significant else "normal",
        )  # fmt: skip


def _fill(look: LineLook) -> dict[str, Any]:
    hatch = _HATCHES[str(look.dash)]
    return {
        "facecolor": look.colour,
        "hatch": hatch,
        "edgecolor": PAPER if hatch else look.colour,
        "linewidth": 0,
    }


def _handles(panel: Panel, style: Mapping[str, LineLook]) -> list[Any]:
    labels = short_names(list(panel.models), 40)
    handles: list[Any] = [
        Patch(label=label, **_fill(style[model])) for model, label in zip(panel.models, labels, strict=True)
    ]
    scores = [score for column in panel.models.values() for score in column if score is not None]
    if any(score.interval for score in scores):
        handles.append(whisker_handle())
    if any(len(score.seeds) > 1 for score in scores):
        handles.append(seeds_handle())
    if any(score.difference is not None for score in scores):
        remarks = [f"difference: to {labels[0]}"]
        if any(score.significant for score in scores):
            remarks.append("bold: 95 % interval over images excludes 0")
        handles += [Patch(facecolor="none", edgecolor="none", label=remark) for remark in remarks]
    return handles


def _words(several: bool) -> Words:
    caption = "Bars are means over training seeds, whiskers 95 % bootstrap intervals over images, dots single seeds."
    if several:
        caption += " Differences are to the first model, in points, bold where their interval over images excludes 0."
    return (
        "Bars of every benchmark's metrics in percent, one group per benchmark, one bar per model.",
        caption,
    )
