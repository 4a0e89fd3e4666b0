"""Recall of every backbone as bars, before and after alignment: by task (fig. 4) and by head (fig. 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    Estimate,
    Measured,
    Model,
    change,
    comparisons,
    estimate,
    heads_of,
    main_source,
    models,
)
from localign.report.tables.rows import HEAD_NAMES, TASK_NAMES, probe_runs

Results = Mapping[str, Any]
_PAIR, _LONE, _GAP, _FRAME = 0.44, 0.22, 0.1, 1.0
"""Heights of a line with two bars, with one, between lines, and of titles and axis, inches."""
HEADER = (
    "panel", "label", "backbone", "role", "macro_recall", "low", "high", "seeds",
    "difference", "difference_low", "difference_high", "difference_over",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One backbone in one panel."""

    before: Estimate | None
    after: Estimate | None
    change: Change | None


def tasks_drawing(results: Results, head: str, name: str = "before_after") -> Drawing | None:
    """Local and global recall of every backbone (fig. 4); None where neither task was measured."""
    source = main_source(results)
    panels = {
        TASK_NAMES[task]: Measured(source, head, task)
        for task in ("local", "global", "majority")
        if head in heads_of(results, task)
    }
    return (
        _drawing(results, panels, f"Macro recall, {HEAD_NAMES.get(head, head)}", name, "task")
        if panels
        else None
    )


def heads_drawing(results: Results, name: str = "heads") -> Drawing | None:
    """Local recall by head (fig. 6); None for fewer than two heads."""
    source = main_source(results)
    heads = [h for h in heads_of(results, "local") if h in ("transformer", "mlp", "linear")]
    panels = {HEAD_NAMES.get(head, head): Measured(source, head, "local") for head in heads}
    return _drawing(results, panels, "Local macro recall by head", name, "head") if len(panels) > 1 else None


def _drawing(
    results: Results, panels: Mapping[str, Measured], title: str, name: str, split: str
) -> Drawing | None:
    lines = models(results)
    content = {panel: [_line(results, m, what) for m in lines] for panel, what in panels.items()}
    shown = [i for i in range(len(lines)) if any(_drawn(column[i]) for column in content.values())]
    lines = [lines[i] for i in shown]
    content = {panel: [column[i] for i in shown] for panel, column in content.items()}
    if not lines:
        return None
    aligned = any(c.aligned for c in comparisons(results))
    first = next(iter(probe_runs(results)))
    figure = bars_figure([m.label for m in lines], content, title, aligned, first)
    return Drawing(name, figure, _words(aligned, split), HEADER, _rows(lines, content))


def _drawn(line: Line) -> bool:
    return line.before is not None or line.after is not None


def _line(results: Results, model: Model, what: Measured) -> Line:
    runs = probe_runs(results)
    before, after = (estimate(runs[n], what) if n else None for n in (model.before, model.after))
    against = model.before
    if against is None and not any(c.aligned for c in comparisons(results)):
        against = next(iter(runs))
    found = change(results, against, model.after, what) if against and model.after and after else None
    return Line(before, after, found)


@styled
def bars_figure(
    labels: Sequence[str],
    panels: Mapping[str, Sequence[Line]],
    title: str,
    aligned: bool = True,
    first: str = "",
) -> Figure:
    """Horizontal bars from zero, one line per backbone, one panel per task or head.

    Args:
        labels: Names of the lines.
        panels: Title to one :class:`Line` per label.
        title: Of the whole.
        aligned: Whether the two bars are before and after alignment; else backbones to compare.
        first: What lone backbones are compared with.
    """
    rows = list(zip(*panels.values(), strict=True))
    heights = [_PAIR if any(p.before and p.after for p in row) else _LONE for row in rows]
    inches = sum(heights) + _GAP * len(rows)
    handles = _handles(labels, panels, aligned, first)
    figure = new_figure(WIDTH, _FRAME + inches + legend_height(handles))
    headline(figure, title)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    centres = _centres(heights)
    for ax, (panel, column) in zip(axes, panels.items(), strict=True):
        for y, line in zip(centres, column, strict=True):
            _draw_line(ax, y, line)
        _room(ax, column)
        for y, line in zip(centres, column, strict=True):
            _write_change(ax, y, line.change)
        ax.set_title(panel, loc="left")
        if any(line.change for line in column):
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


def _draw_line(ax: Axes, y: float, line: Line) -> None:
    bars = [(line.before, BASELINE), (line.after, ALIGNED)]
    shown = [(e, colour) for e, colour in bars if e is not None]
    for k, (found, colour) in enumerate(shown):
        at = y + (0.215 * (k - 0.5) if len(shown) == 2 else 0)
        value = 100 * found.value
        ax.barh(at, value, height=0.19, color=colour)
        end = value
        if found.interval is not None:
            low, high = (100 * bound for bound in found.interval)
            ax.errorbar(value, at, xerr=[[max(0, value - low)], [max(0, high - value)]], **WHISKER)
            end = max(end, high)
        if len(found.seeds) > 1:
            ax.plot([100 * v for v in found.seeds], [at] * len(found.seeds), **SEED_DOT)
            end = max(end, *(100 * v for v in found.seeds))
        ax.annotate(
            f"{value:.1f}", (end, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7.5
        )


def _room(ax: Axes, column: Sequence[Line]) -> None:
    """Space at the right for numbers and differences."""
    found = [e for line in column for e in (line.before, line.after) if e is not None]
    ends = [max(e.value, *e.seeds, e.interval[1] if e.interval else 0) for e in found]
    room = 1.45 if any(line.change for line in column) else 1.16
    end = 100 * max([*ends, 0.01])
    ticks = [
        t for t in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(0, end) if 0 <= t <= min(100, end * room)
    ]
    ax.set_xticks(ticks)
    ax.set_xlim(0, end * room)


def _write_change(ax: Axes, y: float, found: Change | None) -> None:
    if found is None:
        return
    ax.text(
        0.995, y, points(found.value), transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize=8.5,
        fontweight="bold" if found.certain else "normal",
    )  # fmt: skip


def _handles(
    labels: Sequence[str], panels: Mapping[str, Sequence[Line]], aligned: bool, first: str
) -> list[Any]:
    lines = [line for column in panels.values() for line in column]
    others = [label for label in labels if label != first]
    names = (first, others[0] if len(others) == 1 else "other backbones")
    if aligned:
        names = ("before alignment", "after alignment")
    sides = ((BASELINE, names[0], "before"), (ALIGNED, names[1], "after"))
    handles: list[Any] = [
        Patch(facecolor=colour, label=short_names([name], 40)[0])
        for colour, name, side in sides
        if any(getattr(line, side) for line in lines)
    ]
    found = [e for line in lines for e in (line.before, line.after) if e is not None]
    if any(e.interval for e in found):
        handles.append(whisker_handle())
    if any(len(e.seeds) > 1 for e in found):
        handles.append(seeds_handle())
    if not aligned and any(line.change for line in lines):
        words = f"difference: to {short_names([first], 40)[0]}"
        handles.append(Patch(facecolor="none", edgecolor="none", label=words))
    if any(line.change and line.change.certain for line in lines):
        handles.append(Patch(facecolor="none", edgecolor="none", label="bold: 95 % interval leaves out 0"))
    return handles


def _rows(lines: Sequence[Model], panels: Mapping[str, Sequence[Line]]) -> tuple[tuple[Any, ...], ...]:
    rows = []
    for panel, column in panels.items():
        for model, line in zip(lines, column, strict=True):
            sides = ((model.before, "before", line.before), (model.after, "after", line.after))
            for name, role, found in sides:
                if found is None:
                    continue
                low, high = found.interval or (None, None)
                tail: tuple[Any, ...] = ("", "", "", "")
                if role == "after" and line.change:
                    tail = (line.change.value, *(line.change.interval or ("", "")), line.change.over)
                rows.append((panel, model.label, name, role, found.value, low, high, len(found.seeds), *tail))
    return tuple(rows)


def _words(aligned: bool, split: str) -> Words:
    what = "before and after alignment" if aligned else "of every backbone"
    return (
        f"Bars of macro recall {what}, one panel per {split}, one line per backbone.",
        f"Macro recall {what}, one panel per {split}. Bars are means over seeds; whiskers are 95 % bootstrap "
        "intervals over images, their bounds averaged over seeds; dots are single seeds. Differences are in "
        "points, bold where their interval leaves out zero.",
    )
