"""Bars of every backbone's recall before and after alignment: by task (fig. 4) and by head (fig. 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

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
from localign.report.style import ALIGNED, BASELINE, INK, MUTED, new_figure, styled
from localign.report.tables.measures import (
    Change,
    ChartLine,
    Estimate,
    change,
    chart_lines,
    comparisons,
    estimate,
    heads_of,
    main_source,
)
from localign.report.tables.rows import HEAD_NAMES, TASK_NAMES, MetricKey, probe_runs
from localign.results import ProbeResults
from localign.text.printing import plain_mathtext

_PAIR, _LONE, _GAP, _FRAME = 0.44, 0.22, 0.1, 1.0
"""Heights in inches: of a line with two bars, of a line with one bar, between lines, of titles and axis together."""
HEADER = (
    "panel", "label", "backbone", "role", "macro_recall", "low", "high", "seeds",
    "difference", "difference_low", "difference_high", "difference_over",
)  # fmt: skip


@dataclass(frozen=True)
class BarGroup:
    """The bars of one line in one panel."""

    before: Estimate | None
    after: Estimate | None
    change: Change | None


def tasks_drawing(results: ProbeResults, head: str, name: str = "before_after") -> Drawing | None:
    """Local and global recall of every backbone (fig. 4); None where neither task was measured."""
    source = main_source(results)
    panels = {
        TASK_NAMES[task]: MetricKey(source, head, task)
        for task in ("local", "global", "majority")
        if head in heads_of(results, task)
    }
    return (
        _drawing(results, panels, f"Macro recall, {HEAD_NAMES.get(head, head)}", name, "task")
        if panels
        else None
    )


def heads_drawing(results: ProbeResults, name: str = "heads") -> Drawing | None:
    """Local recall by head (fig. 6); None for fewer than two heads."""
    source = main_source(results)
    heads = [h for h in heads_of(results, "local") if h in ("transformer", "mlp", "linear")]
    panels = {HEAD_NAMES.get(head, head): MetricKey(source, head, "local") for head in heads}
    return _drawing(results, panels, "Local macro recall by head", name, "head") if len(panels) > 1 else None


def _drawing(
    results: ProbeResults, panels: Mapping[str, MetricKey], title: str, name: str, split: str
) -> Drawing | None:
    lines = chart_lines(results)
    content = {panel: [_bar_group(results, line, key) for line in lines] for panel, key in panels.items()}
    drawn = [i for i in range(len(lines)) if any(_has_bars(column[i]) for column in content.values())]
    lines = [lines[i] for i in drawn]
    content = {panel: [column[i] for i in drawn] for panel, column in content.items()}
    if not lines:
        return None
    aligned = any(pair.aligned for pair in comparisons(results))
    first = next(iter(probe_runs(results)))
    figure = bars_figure([line.label for line in lines], content, title, aligned, first)
    return Drawing(name, figure, _words(aligned, split), HEADER, _rows(lines, content))


def _has_bars(group: BarGroup) -> bool:
    return group.before is not None or group.after is not None


def _bar_group(results: ProbeResults, line: ChartLine, key: MetricKey) -> BarGroup:
    runs = probe_runs(results)
    before, after = (estimate(runs[name], key) if name else None for name in (line.before, line.after))
    against = line.before
    if against is None and not any(pair.aligned for pair in comparisons(results)):
        against = next(iter(runs))
    difference = change(results, against, line.after, key) if against and line.after and after else None
    return BarGroup(before, after, difference)


@styled
def bars_figure(
    labels: Sequence[str],
    panels: Mapping[str, Sequence[BarGroup]],
    title: str,
    aligned: bool = True,
    first: str = "",
) -> Figure:
    """Horizontal bars from zero, one line per backbone, one panel per task or head.

    Args:
        labels: Names of the lines.
        panels: Panel title to one :class:`BarGroup` per label.
        title: Title of the figure.
        aligned: Whether the two colours are before and after alignment; otherwise the first backbone and the others.
        first: Name of the first backbone, which the others are compared with.
    """
    rows = list(zip(*panels.values(), strict=True))
    heights = [_PAIR if any(group.before and group.after for group in row) else _LONE for row in rows]
    inches = sum(heights) + _GAP * len(rows)
    handles = _handles(labels, panels, aligned, first)
    figure = new_figure(WIDTH, _FRAME + inches + legend_height(handles))
    headline(figure, title)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    centres = _centres(heights)
    for ax, (panel, column) in zip(axes, panels.items(), strict=True):
        for y, group in zip(centres, column, strict=True):
            _draw_bars(ax, y, group)
        _set_limits(ax, column)
        for y, group in zip(centres, column, strict=True):
            _write_change(ax, y, group.change)
        ax.set_title(plain_mathtext(panel), loc="left")
        if any(group.change for group in column):
            ax.set_title("difference, points", loc="right", fontsize=8, color=MUTED)
        ax.set_xlabel("macro recall, %")
        ax.set_axisbelow(True)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(centres, short_names(labels), color=INK)
    axes[0].set_ylim(inches, 0)
    legend_below(figure, handles)
    return figure


def _centres(heights: Sequence[float]) -> list[float]:
    centres, top = [], 0.0
    for height in heights:
        centres.append(top + (_GAP + height) / 2)
        top += height + _GAP
    return centres


def _draw_bars(ax: Axes, y: float, group: BarGroup) -> None:
    both = [(group.before, BASELINE), (group.after, ALIGNED)]
    bars = [(recall, colour) for recall, colour in both if recall is not None]
    for k, (recall, colour) in enumerate(bars):
        at = y + (0.215 * (k - 0.5) if len(bars) == 2 else 0)
        value = 100 * recall.value
        ax.barh(at, value, height=0.19, color=colour)
        end = value
        if recall.interval is not None:
            low, high = (100 * bound for bound in recall.interval)
            ax.errorbar(value, at, xerr=[[max(0, value - low)], [max(0, high - value)]], **WHISKER)
            end = max(end, high)
        if len(recall.seeds) > 1:
            ax.plot([100 * v for v in recall.seeds], [at] * len(recall.seeds), **SEED_DOT)
            end = max(end, *(100 * v for v in recall.seeds))
        ax.annotate(
            f"{value:.1f}", (end, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7.5
        )


def _estimates(groups: Iterable[BarGroup]) -> list[Estimate]:
    return [recall for group in groups for recall in (group.before, group.after) if recall is not None]


def _set_limits(ax: Axes, column: Sequence[BarGroup]) -> None:
    """Leave space at the right for numbers and differences."""
    ends = [max(e.value, *e.seeds, e.interval[1] if e.interval else 0) for e in _estimates(column)]
    room = 1.45 if any(group.change for group in column) else 1.16
    end = 100 * max([*ends, 0.01])
    ticks = [
        t for t in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(0, end) if 0 <= t <= min(100, end * room)
    ]
    ax.set_xticks(ticks)
    ax.set_xlim(0, end * room)


def _write_change(ax: Axes, y: float, difference: Change | None) -> None:
    if difference is None:
        return
    mark = "*" if difference.converged is False else ""
    ax.text(
        0.995, y, f"{points(difference.value)}{mark}", transform=ax.get_yaxis_transform(), ha="right", va="center",
        fontsize=8.5, fontweight="bold" if difference.significant else "normal",
    )  # fmt: skip


def _handles(
    labels: Sequence[str], panels: Mapping[str, Sequence[BarGroup]], aligned: bool, first: str
) -> list[Any]:
    groups = [group for column in panels.values() for group in column]
    others = [label for label in labels if label != first]
    names = (first, others[0] if len(others) == 1 else "other backbones")
    if aligned:
        names = ("before alignment", "after alignment")
    sides = ((BASELINE, names[0], "before"), (ALIGNED, names[1], "after"))
    handles: list[Any] = [
        Patch(facecolor=colour, label=short_names([name], 40)[0])
        for colour, name, side in sides
        if any(getattr(group, side) for group in groups)
    ]
    estimates = _estimates(groups)
    if any(e.interval for e in estimates):
        handles.append(whisker_handle())
    if any(len(e.seeds) > 1 for e in estimates):
        handles.append(seeds_handle())
    if not aligned and any(group.change for group in groups):
        label = f"difference: to {short_names([first], 40)[0]}"
        handles.append(Patch(facecolor="none", edgecolor="none", label=label))
    if any(group.change and group.change.significant for group in groups):
        handles.append(Patch(facecolor="none", edgecolor="none", label="bold: 95 % interval excludes 0"))
    if any(group.change and group.change.converged is False for group in groups):
        handles.append(Patch(facecolor="none", edgecolor="none", label="*: heads not converged"))
    return handles


def _rows(
    lines: Sequence[ChartLine], panels: Mapping[str, Sequence[BarGroup]]
) -> tuple[tuple[Any, ...], ...]:
    rows = []
    for panel, column in panels.items():
        for line, group in zip(lines, column, strict=True):
            sides = ((line.before, "before", group.before), (line.after, "after", group.after))
            for name, role, recall in sides:
                if recall is None:
                    continue
                low, high = recall.interval or (None, None)
                tail: tuple[Any, ...] = ("", "", "", "")
                if role == "after" and group.change:
                    tail = (group.change.value, *(group.change.interval or ("", "")), group.change.over)
                rows.append(
                    (panel, line.label, name, role, recall.value, low, high, len(recall.seeds), *tail)
                )
    return tuple(rows)


def _words(aligned: bool, split: str) -> Words:
    subject = "before and after alignment" if aligned else "of every backbone"
    return (
        f"Bars of macro recall {subject}, one panel per {split}, one line per backbone.",
        f"Macro recall {subject}, one panel per {split}. Bars are means over seeds; whiskers are 95 % bootstrap "
        "intervals over images, their bounds averaged over seeds; dots are single seeds. Differences are in "
        "points, bold where their interval excludes zero.",
    )
