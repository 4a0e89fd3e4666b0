"""Line plots: how alignment and the probing heads trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from localign.report.figures.drawing import WIDTH
from localign.report.style import ALIGNED, BASELINE, CATEGORICAL, ERROR, MODELS, new_figure, styled
from localign.results import CurvePoint, LogEntry
from localign.text.printing import plain_mathtext

Curve = Sequence[CurvePoint]
_MARK_BELOW = 25
"""Curves with fewer points than this mark each point."""


def series(log: Sequence[LogEntry], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of one logged quantity; entries without a finite value are left out."""
    return _finite_series((entry.get("step"), entry.get(name)) for entry in log)


def _finite_series(pairs: Iterable[tuple[object, object]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    finite = [
        (step, value)
        for step, value in pairs
        if isinstance(step, (int, float)) and isinstance(value, (int, float)) and math.isfinite(value)
    ]
    steps, values = zip(*finite, strict=True) if finite else ((), ())
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


@styled
def training_figure(log: Sequence[LogEntry], soft_cap: float | None = None) -> Figure | None:
    """Loss, gradient norm, learning rate and largest attention logit over the steps, each if it was logged.

    Args:
        log: Entries of ``log.jsonl``.
        soft_cap: Bound of the attention logits, drawn as a line; None for no bound.

    Returns:
        None where nothing was logged.
    """
    panels = [
        ("reconstruction loss", (("loss", "training", BASELINE), ("val_loss", "validation", ALIGNED))),
        ("gradient norm", (("grad_norm", "before clipping", ALIGNED),)),
        ("learning rate", (("lr", "", ALIGNED),)),
        ("largest attention logit", (("attention_logit_max", "before the soft-cap", ALIGNED),)),
    ]
    shown = [(t, lines) for t, lines in panels if any(len(series(log, name)[0]) for name, _, _ in lines)]
    if not shown:
        return None
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(WIDTH / 2 * columns, 2.7 * rows)
    axes = list(np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).flat)
    for ax, (title, lines) in zip(axes, shown, strict=False):
        for name, label, colour in lines:
            steps, values = series(log, name)
            if len(steps):
                many = name == "loss" and len(steps) >= _MARK_BELOW
                ax.plot(
                    steps, values, color=colour, label=label, alpha=0.85, **_mark(len(steps), line=not many)
                )
        _finish(ax, title, "step")
        if title == "largest attention logit" and soft_cap:
            _draw_cap(ax, soft_cap)
        if title in ("reconstruction loss", "gradient norm") and _spread(ax) > 30:
            ax.set_yscale("log")
        if any(line.get_label() for line in ax.lines if not str(line.get_label()).startswith("_")):
            ax.legend(loc="best")
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    return figure


@styled
def heads_figure(curves: Mapping[str, Sequence[Curve]]) -> Figure | None:
    """Loss of every probing head over its training: one panel per task and head, with all models.

    Args:
        curves: By model, one curve per seed.

    Returns:
        Lines are means over seeds, bands the range of the validation loss. None without curves.
    """
    shown = _heads(curves)
    if not shown:
        return None
    tasks = list(dict.fromkeys(task for task, _ in shown))
    heads = list(dict.fromkeys(head for _, head in shown))
    figure = new_figure(WIDTH if len(heads) > 1 else WIDTH / 2, 0.5 + 2.6 * len(tasks))
    grid = figure.subplots(len(tasks), len(heads), squeeze=False)
    for row, task in enumerate(tasks):
        for column, head in enumerate(heads):
            ax = grid[row, column]
            if (task, head) not in shown:
                ax.set_axis_off()
                continue
            for i, (model, seeds) in enumerate(curves.items()):
                colour = MODELS.get(model, CATEGORICAL[i % len(CATEGORICAL)])
                _draw_head(ax, seeds, head, task, model, colour)
            _finish(ax, f"{task} task, {head} head", "step" if row == len(tasks) - 1 else "")
            if column == 0:
                ax.set_ylabel("loss")
    labels: dict[str, Any] = {}
    for ax in grid.flat:
        handles, names = ax.get_legend_handles_labels()
        labels.update(zip(names, handles, strict=True))
    figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=min(4, len(labels)))
    return figure


def _heads(curves: Mapping[str, Sequence[Curve]]) -> list[tuple[str, str]]:
    """(task, head) of all curves."""
    found: dict[tuple[str, str], None] = {}
    for seeds in curves.values():
        for curve in seeds:
            for point in curve:
                for head, tasks in point.items():
                    if isinstance(tasks, Mapping):
                        found.update(dict.fromkeys((task, head) for task in tasks))
    order = {"local": 0, "global": 1}
    return sorted(found, key=lambda key: order.get(key[0], 2))


def _head_series(
    curve: Curve, head: str, task: str, split: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and losses of one head."""
    pairs = []
    for point in curve:
        tasks = point.get(head)
        if isinstance(tasks, Mapping) and task in tasks:
            pairs.append((point.get("step"), tasks[task].get(split)))
    return _finite_series(pairs)


def _draw_head(ax: Axes, seeds: Sequence[Curve], head: str, task: str, model: str, colour: str) -> None:
    for split, dash in (("train", (0, (4, 2))), ("validation", "solid")):
        lines = [_head_series(curve, head, task, split) for curve in seeds]
        lines = [line for line in lines if len(line[0])]
        if not lines:
            continue
        shortest = min(len(steps) for steps, _ in lines)
        steps = lines[0][0][:shortest]
        values = np.stack([v[:shortest] for _, v in lines])
        mark = _mark(shortest) if split == "validation" else {}
        ax.plot(
            steps,
            values.mean(0),
            color=colour,
            linestyle=dash,
            label=plain_mathtext(f"{model}, {split}"),
            **mark,
        )
        if len(values) > 1 and split == "validation":
            ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)


def _draw_cap(ax: Axes, soft_cap: float) -> None:
    """Draw the bound as a line; if all logits stay far below it, only name it, or the curve would be flat."""
    if ax.get_ylim()[1] < soft_cap / 3:
        ax.plot([], [], " ", label=f"(soft-cap {soft_cap:g}, above this axis)")
        return
    ax.axhline(soft_cap, color=ERROR, linewidth=1, linestyle=(0, (4, 3)), label=f"soft-cap {soft_cap:g}")


def _mark(points: int, line: bool = True) -> dict[str, Any]:
    style: dict[str, Any] = {"marker": "o", "markersize": 3} if points < _MARK_BELOW else {}
    return style if line else {"linewidth": 1.0}


def _spread(ax: Axes) -> float:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.lines])
    return float(values.max() / values.min()) if len(values) and values.min() > 0 else 1.0


def _finish(ax: Axes, title: str, xlabel: str) -> None:
    ax.set_title(title, loc="left")
    ax.set_xlabel(xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    low, high = ax.get_ylim()
    if 0 < low < 0.35 * high:
        ax.set_ylim(bottom=0)
