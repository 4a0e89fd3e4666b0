"""Qualitative predictions (fig. 3): the most probable class of every patch, for any number of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from localign.report.captions import Words, predictions
from localign.report.classmarks import GROUND_FILL, OTHER_FILL, looks_from_names
from localign.report.figures.drawing import (
    Drawing,
    bare,
    below,
    legend_below,
    legend_height,
    short_names,
    show,
)
from localign.report.figures.predictions import (
    MAX_IMAGES,
    Predicted,
    predicted_by,
    predicted_names,
    predictions_figure,
)
from localign.report.style import CATEGORICAL, ERROR, INK, PAPER, RULE, new_figure, styled
from localign.results import Pictures
from localign.text.printing import plain_mathtext

MAX_BACKBONES = 4
_HATCHES = ("", "////")
"""Each colour comes plain and striped, which gives twenty different looks."""
_SIDE = 2.3
"""Side of one picture, inches."""
_REGION = 4
"""Regions of at least this many patches carry the number of their class."""
HEADER = ("image", "backbone", "patches", "right")


@dataclass(frozen=True)
class ClassLook:
    """The look of a class: fill and sign."""

    fill: str
    hatch: str
    number: int
    """Number in the legend and in the pictures; 0 for classes that share the grey of "other classes"."""


def predictions_drawing(
    arrays: Pictures, labels: Mapping[str, str] | None = None, name: str = "predictions"
) -> Drawing | None:
    """Image, truth, and predictions of up to four backbones; None where the arrays hold none.

    If all class names are colours and shapes, every class above 0.5 is drawn, and classes may share a patch.
    Otherwise the most probable class of each patch is drawn.

    Args:
        arrays: ``images``, ``class_names`` and, for every backbone, the arrays of
            :func:`~localign.report.figures.predictions.predicted_by`.
        labels: Backbones to their display names, in the order to show them; backbones without arrays are left out.
        name: Name of the files.
    """
    stored = predicted_names(arrays)
    if not stored or not {"images", "class_names", "truth", "grid"} <= set(arrays):
        return None
    names = {n: label for n, label in (labels or {}).items() if n in stored} or {n: n for n in stored}
    names = dict(list(names.items())[:MAX_BACKBONES])
    names = dict(zip(names, short_names(list(names.values()), 26), strict=True))
    classes = [str(c) for c in arrays["class_names"]]
    count = min(MAX_IMAGES, len(arrays["images"]))
    sides = {n: predicted_by(arrays, n, count) for n in names}
    rows = tuple(
        (i, n, int(_counted(side)[i].sum()), int(_right(side)[i].sum()))
        for i in range(count)
        for n, side in sides.items()
    )
    if looks_from_names(classes):
        return Drawing(
            name, predictions_figure(arrays, names), predictions(classes), HEADER, rows, vector=False
        )
    figure = most_probable_figure(
        arrays["images"][:count], {names[n]: side for n, side in sides.items()}, classes
    )
    return Drawing(name, figure, _WORDS, HEADER, rows, vector=False)


def _right(side: Predicted) -> NDArray[np.bool_]:
    """``(k, n)``: whether the most probable class is one of the patch's classes."""
    best = side.probability.argmax(-1)[..., None]
    return np.asarray(np.take_along_axis(side.truth, best, -1)[..., 0], dtype=bool)


def _counted(side: Predicted) -> NDArray[np.bool_]:
    """``(k, n)``: whether a patch has a class. Patches of ignored pixels have none."""
    return np.asarray(side.truth.any(-1), dtype=bool)


@styled
def most_probable_figure(
    images: NDArray[np.uint8], sides: Mapping[str, Predicted], class_names: Sequence[str]
) -> Figure:
    """Image, truth, and the most probable class of every patch, backbone by backbone.

    Args:
        images: uint8 ``(k, 3, H, W)``.
        sides: Predictions of each backbone, by display name.
        class_names: C names; the first is "unlabeled".
    """
    first = next(iter(sides.values()))
    looks = _looks(first, list(sides.values()))
    handles = _handles(looks, class_names)
    rows, columns = first.grid
    width = _SIDE * (2 + len(sides)) + 0.2
    height = (_SIDE * rows / columns + 0.3) * len(images) + 0.25 + legend_height(handles, width)
    figure = new_figure(width, height)
    axes = figure.subplots(len(images), 2 + len(sides), squeeze=False)
    for ax, title in zip(axes[0], ("image", "truth", *sides), strict=True):
        ax.set_title(plain_mathtext(title))
    for i, image in enumerate(images):
        show(axes[i, 0], image.transpose(1, 2, 0))
        _draw(axes[i, 1], _true_classes(first, i), looks, first.grid)
        for ax, side in zip(axes[i, 2:], sides.values(), strict=True):
            best = side.probability[i].argmax(-1)
            highest = side.probability[i].max(-1)
            right = _right(side)[i]
            predicted = [[(int(c), float(p))] for c, p in zip(best, highest, strict=True)]
            counted = _counted(side)[i]
            _draw(ax, predicted, looks, side.grid, ~right & counted)
            below(ax, f"{int(right.sum())} of {int(counted.sum())} patches right")
    legend_below(figure, handles)
    return figure


def _true_classes(side: Predicted, image: int) -> list[list[tuple[int, float]]]:
    """Classes and probabilities per patch: its majority class; where that is unknown, all its classes."""
    if side.majority is not None:
        return [[(int(c), 1.0)] if c >= 0 else [] for c in side.majority[image]]
    return [[(int(c), 1.0) for c in np.flatnonzero(patch)] for patch in side.truth[image]]


def _looks(first: Predicted, sides: Sequence[Predicted]) -> dict[int, ClassLook]:
    """A look for every class that is drawn; the twenty most frequent classes get one of their own."""
    classes = first.truth.shape[-1]
    frequency = np.zeros(classes)
    for image in range(len(first.truth)):
        for patch in _true_classes(first, image):
            for c, _ in patch:
                frequency[c] += 1
    for side in sides:
        frequency += np.bincount(side.probability.argmax(-1).ravel(), minlength=classes)
    order = [int(c) for c in np.argsort(-frequency, kind="stable") if frequency[c] > 0]
    looks: dict[int, ClassLook] = {}
    styles = [(fill, hatch) for hatch in _HATCHES for fill in CATEGORICAL]
    for c in order:
        number = sum(look.number > 0 for look in looks.values()) + 1
        if c == 0:
            looks[c] = ClassLook(GROUND_FILL, "", number)
        elif styles:
            looks[c] = ClassLook(*styles.pop(0), number)
        else:
            looks[c] = ClassLook(OTHER_FILL, "", 0)
    return looks


def _draw(
    ax: Axes,
    patches: Sequence[Sequence[tuple[int, float]]],
    looks: Mapping[int, ClassLook],
    grid: tuple[int, int],
    wrong: NDArray[np.bool_] | None = None,
) -> None:
    """Stripes of each patch's classes, paler for lower probabilities, with the numbers of the larger regions."""
    rows, columns = grid
    boxes: dict[int, list[tuple[Rectangle, float]]] = {}
    for place, classes in enumerate(patches):
        y, x = divmod(place, columns)
        for k, (c, probability) in enumerate(classes):
            width = 1 / len(classes)
            box = Rectangle((x - 0.5 + k * width, y - 0.5), width, 1)
            boxes.setdefault(c, []).append((box, probability))
    for c, parts in boxes.items():
        look = looks[c]
        ax.add_collection(
            PatchCollection(
                [box for box, _ in parts],
                facecolors=[to_rgba(look.fill, 0.3 + 0.7 * probability) for _, probability in parts],
                edgecolors=to_rgba(PAPER, 0.75),
                linewidths=0.0,
                hatch=look.hatch or None,
            )
        )
    cell = 72 * _SIDE * 0.94 / columns
    if wrong is not None:
        places = np.flatnonzero(wrong)
        size = float(np.clip(0.22 * cell, 1.3, 3.2))
        ax.plot(
            places % columns, places // columns, linestyle="none", marker="o", markersize=size, color=ERROR,
            markeredgecolor=PAPER, markeredgewidth=0.3,
        )  # fmt: skip
    first_class = np.asarray([classes[0][0] if classes else -1 for classes in patches])
    for c, (y, x) in region_centres(first_class.reshape(rows, columns), _REGION):
        if c in looks and looks[c].number:
            ax.text(
                x, y, str(looks[c].number), ha="center", va="center", fontsize=7, color=INK, fontweight="bold",
                path_effects=[withStroke(linewidth=2, foreground=PAPER)],
            )  # fmt: skip
    bare(ax, frame=True)
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(rows - 0.5, -0.5)
    ax.set_aspect("equal")


def region_centres(classes: NDArray[np.integer], smallest: int) -> list[tuple[int, tuple[int, int]]]:
    """The central patch of every connected region of one class: the patch of the region nearest to its mean.

    Args:
        classes: ``(rows, columns)``.
        smallest: Regions with fewer patches are left out.

    Returns:
        ``(class, (row, column))`` per region, in row order.
    """
    rows, columns = classes.shape
    seen = np.zeros(classes.shape, dtype=bool)
    centres = []
    for start in np.ndindex(rows, columns):
        if seen[start]:
            continue
        seen[start] = True
        region, edge = [start], [start]
        while edge:
            y, x = edge.pop()
            for neighbour in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= neighbour[0] < rows and 0 <= neighbour[1] < columns
                if inside and not seen[neighbour] and classes[neighbour] == classes[start]:
                    seen[neighbour] = True
                    region.append(neighbour)
                    edge.append(neighbour)
        if len(region) >= smallest:
            cells: NDArray[np.float64] = np.asarray(region, dtype=np.float64)
            nearest = cells[((cells - cells.mean(0)) ** 2).sum(1).argmin()]
            centres.append((int(classes[start]), (int(nearest[0]), int(nearest[1]))))
    return centres


def _handles(looks: Mapping[int, ClassLook], class_names: Sequence[str]) -> list[Any]:
    own = sorted((look.number, c) for c, look in looks.items() if look.number)
    names = short_names([class_names[c] for _, c in own], 24)
    handles: list[Any] = [
        Patch(
            facecolor=looks[c].fill, hatch=looks[c].hatch or None, label=f"{number}  {name}",
            edgecolor=PAPER if looks[c].hatch else RULE, linewidth=0.5,
        )
        for (number, c), name in zip(own, names, strict=True)
    ]  # fmt: skip
    rest = sum(not look.number for look in looks.values())
    if rest:
        handles.append(Patch(facecolor=OTHER_FILL, label=f"{rest} other classes"))
    dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 3.2, "markeredgewidth": 0.3}
    return [
        *handles,
        Line2D([], [], color=ERROR, markeredgecolor=PAPER, label="not a class of the patch", **dot),
    ]


_WORDS: Words = (
    "Images, the true class of every patch, and the class that a head predicts from each backbone.",
    "The most probable class of each patch according to a local-task head, paler for lower probabilities. Numbers "
    "name the larger regions; a dot marks a patch that does not contain the predicted class. The truth is the class "
    "with most of the patch's pixels; where that was not stored, all classes of the patch in stripes.",
)
