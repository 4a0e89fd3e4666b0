"""All classes that a head predicts in each patch, as colours and signs. Arrays in, figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from localign.report.classmarks import OTHER_FILL, ClassMark, class_marks
from localign.report.figures.drawing import bare, below, show
from localign.report.style import ALIGNED, ERROR, INK, RULE, new_figure, styled
from localign.results import Pictures
from localign.text.printing import plain_mathtext

THRESHOLD = 0.5
"""A class is predicted above this probability."""
MAX_IMAGES = 6
FIXED_MARK, BROKEN_MARK = "o", "X"
_CELL = 0.84
"""Side of a drawn patch; the outline of a wrong patch lies in the gap around it."""


def wrong_patches(probability: NDArray[np.floating], truth: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the set of classes above 0.5 differs from the true set.

    Args:
        probability: ``(..., n, C)``.
        truth: ``(..., n, C)``.

    Returns:
        bool ``(..., n)``.
    """
    return np.asarray(((probability > THRESHOLD) != truth).any(-1))


@dataclass(frozen=True)
class Predicted:
    """Predictions of a local-task head on one backbone; the number of patches n may differ between backbones."""

    probability: NDArray[np.float64]
    """``(k, n, C)``."""
    truth: NDArray[np.bool_]
    """``(k, n, C)``."""
    majority: NDArray[np.integer] | None
    """``(k, n)``, the class with most pixels of each patch; None where it is unknown."""
    grid: tuple[int, int]
    """Rows and columns of patches."""


def predicted_by(arrays: Pictures, name: str, count: int) -> Predicted:
    """The predictions of one backbone on the first ``count`` images.

    Args:
        arrays: ``probability_<name>``, ``truth``, ``grid`` and, optionally, ``majority``. A backbone with a grid of
            its own has ``truth_<name>``, ``grid_<name>`` and, optionally, ``majority_<name>`` instead.
        name: The backbone.
        count: Number of images.
    """
    own = f"grid_{name}" in arrays
    tail = f"_{name}" if own else ""
    majority = arrays.get(f"majority{tail}")
    rows, columns = (int(v) for v in arrays[f"grid{tail}"])
    return Predicted(
        arrays[f"probability_{name}"][:count].astype(np.float64),
        arrays[f"truth{tail}"][:count],
        None if majority is None else majority[:count],
        (rows, columns),
    )


def predicted_names(arrays: Pictures) -> list[str]:
    """Backbones whose predictions the arrays hold, in order."""
    prefix = "probability_"
    return [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]


@styled
def predictions_figure(arrays: Pictures, names: Mapping[str, str] | None = None) -> Figure:
    """Image, truth, and all classes that a local-task head predicts in each patch, backbone by backbone.

    Args:
        arrays: ``images``, ``truth``, ``class_names``, ``grid`` and ``probability_<name>``.
        names: Backbones to their display names; ``baseline`` and ``aligned`` by default.
    """
    names = names or {"baseline": "baseline", "aligned": "aligned"}
    count = min(MAX_IMAGES, len(arrays["images"]))
    sides = [predicted_by(arrays, name, count) for name in names]
    truth = sides[0].truth
    frequency = truth.sum((0, 1)) + sum((s.probability > THRESHOLD).sum((0, 1)) for s in sides)
    marks = class_marks([str(n) for n in arrays["class_names"]], np.asarray(frequency, dtype=np.float64))
    rows, columns = sides[0].grid
    titles = ("image", "truth", *(f"predicted: {name}" for name in names.values()))
    side = 2.35
    figure = new_figure(side * len(titles) + 0.2, (side * rows / columns + 0.28) * count + 0.95)
    axes = figure.subplots(count, len(titles), squeeze=False)
    for i in range(count):
        show(axes[i, 0], arrays["images"][i].transpose(1, 2, 0))
        _draw_patches(axes[i, 1], truth[i].astype(np.float64), None, sides[0].grid, marks, side)
        for ax, predicted in zip(axes[i, 2:], sides, strict=True):
            wrong = wrong_patches(predicted.probability[i], predicted.truth[i])
            _draw_patches(ax, predicted.probability[i], wrong, predicted.grid, marks, side)
            remark = f"{int(wrong.sum())} of {len(wrong)} patches wrong"
            if predicted is not sides[0] and predicted.grid == sides[0].grid:
                remark += _mark_changes(ax, sides[0], predicted, i)
            below(ax, remark)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(plain_mathtext(title))
    handles = _legend(marks)
    columns = _legend_columns([str(h.get_label()) for h in handles], figure.get_figwidth())
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.4)
    return figure


def _mark_changes(ax: Axes, before: Predicted, after: Predicted, image: int) -> str:
    """Mark the patches of an image that a model fixes or breaks against the first one; returns their numbers."""
    was, is_ = (~wrong_patches(side.probability[image], side.truth[image]) for side in (before, after))
    columns = after.grid[1]
    for chosen, marker, colour in ((is_ & ~was, FIXED_MARK, ALIGNED), (was & ~is_, BROKEN_MARK, ERROR)):
        rows, places = np.divmod(np.flatnonzero(chosen), columns)
        size = (2.35 * 72 * 0.2 / columns) ** 2
        ax.scatter(
            places + 0.3, rows - 0.3, s=size, marker=marker, c=colour, edgecolors="white", linewidths=0.5
        )
    return f"\n{int((is_ & ~was).sum())} fixed, {int((was & ~is_).sum())} broken"


def _draw_patches(
    ax: Axes,
    probability: NDArray[np.float64],
    wrong: NDArray[np.bool_] | None,
    grid: tuple[int, int],
    marks: Sequence[ClassMark],
    inches: float,
) -> None:
    """One cell per patch, with stripes in the fills and with the signs of its classes above the threshold."""
    rows, columns = grid
    boxes, faces = [], []
    signs: dict[int, list[tuple[float, float, float, float]]] = {}
    for patch in range(rows * columns):
        y, x = divmod(patch, columns)
        chosen = [
            c for c in np.argsort(-probability[patch], kind="stable") if probability[patch, c] > THRESHOLD
        ]
        filled = sorted((c for c in chosen if marks[c].fill), key=int)
        for k, c in enumerate(filled):
            width = _CELL / len(filled)
            boxes.append(Rectangle((x - _CELL / 2 + k * width, y - _CELL / 2), width, _CELL))
            faces.append(to_rgba(str(marks[c].fill), _opacity(probability[patch, c])))
        signed = sorted((c for c in chosen if marks[c].sign is not None), key=int)[:3]
        for k, c in enumerate(signed):
            shift = (k - (len(signed) - 1) / 2) * _CELL / len(signed)
            size = 0.5 if len(signed) == 1 else 0.72 / len(signed)
            signs.setdefault(int(c), []).append((x + shift, y, size, _opacity(probability[patch, c])))
    ax.add_collection(PatchCollection(boxes, facecolors=faces, edgecolors="none"))
    cell = inches * 72 * 0.94 / columns
    for c, places in signs.items():
        xs, ys, sizes, alphas = (np.asarray(v) for v in zip(*places, strict=True))
        ink = [to_rgba(INK, a) for a in alphas]
        ax.scatter(
            xs, ys, s=(sizes * cell) ** 2, marker=marks[c].sign, c=ink, edgecolors="white", linewidths=0.4
        )
    if wrong is not None:
        outlines = [
            Rectangle((p % columns - 0.46, p // columns - 0.46), 0.92, 0.92) for p in np.flatnonzero(wrong)
        ]
        thin = float(np.clip(cell * 0.09, 0.5, 1.2))
        ax.add_collection(PatchCollection(outlines, facecolors="none", edgecolors=ERROR, linewidths=thin))
    bare(ax, frame=True)
    ax.set_xlim(-0.56, columns - 0.44)
    ax.set_ylim(rows - 0.44, -0.56)
    ax.set_aspect("equal")


def _opacity(probability: float) -> float:
    """Opacity of a class: 1 at probability 1, a quarter at the threshold."""
    return 0.25 + 0.75 * float(np.clip((probability - THRESHOLD) / (1 - THRESHOLD), 0, 1))


def _legend(marks: Sequence[ClassMark]) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = []
    for mark in marks:
        if not mark.in_legend:
            continue
        label = plain_mathtext(mark.name if len(mark.name) <= 22 else mark.name[:21] + "…")
        if mark.sign is None:
            edge = RULE if mark.fill == "#FFFFFF" else "none"
            handles.append(Patch(facecolor=mark.fill, edgecolor=edge, label=label))
        else:
            colour = mark.fill or INK
            handles.append(
                Line2D([], [], linestyle="none", marker=mark.sign, color=colour, label=label, markersize=6)
            )
    if any(m.fill == OTHER_FILL for m in marks):
        handles.append(Patch(facecolor=OTHER_FILL, label="other classes"))
    handles.append(Patch(facecolor="none", edgecolor=ERROR, label="set of classes differs from truth"))
    for marker, colour, label in (
        (FIXED_MARK, ALIGNED, "fixed: differed before, and not now"),
        (BROKEN_MARK, ERROR, "broken: differs now, and not before"),
    ):
        handles.append(
            Line2D([], [], linestyle="none", marker=marker, color=colour, label=label, markersize=6)
        )
    return handles


def _legend_columns(labels: Sequence[str], inches: float) -> int:
    """The largest number of columns that fits, each as wide as its longest label."""
    for count in range(min(7, len(labels)), 1, -1):
        columns = np.array_split(np.asarray([len(label) for label in labels]), count)
        if sum(0.075 * column.max() + 0.5 for column in columns) <= inches:
            return count
    return 1
