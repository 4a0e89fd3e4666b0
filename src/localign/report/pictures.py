"""Pictures of patches: predictions, feature maps, reconstructions. Arrays in, figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from localign.report.classmarks import OTHER_FILL, ClassMark, class_marks
from localign.report.style import ERROR, INK, MUTED, RULE, new_figure, styled

Arrays = Mapping[str, NDArray[Any]]
THRESHOLD = 0.5
MAX_IMAGES, MAX_RECONSTRUCTED = 6, 4
VIEW_NAMES = ("mask", "complement", "all visible")
CHANNEL_COLOURS = matplotlib.colormaps["PuOr"]
CHANNEL_RANGE = 2.5
"""Standard deviations at which a channel's colour is full."""
_CELL = 0.84
"""Side of a drawn patch; the gap around it is where the outline of a wrong one lies."""


def wrong_patches(probability: NDArray[np.floating], truth: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Patches whose set of classes above 0.5 is not the true set: ``(..., n, C)`` twice to ``(..., n)``."""
    return np.asarray(((probability > THRESHOLD) != truth).any(-1))


def component_colours(
    scores: NDArray[np.floating], reference: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Three component scores as red, green and blue.

    Args:
        scores: ``(..., 3)``.
        reference: Scores ``(..., 3)`` that set the scale, these by default: its 1st percentile becomes 0, its
            99th 1, each component by itself.

    Returns:
        float64, same shape, in 0..1.
    """
    flat = (scores if reference is None else reference).astype(np.float64).reshape(-1, 3)
    low, high = np.percentile(flat, [1, 99], axis=0)
    return np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)


# -- per-patch predictions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicted:
    """What a local-task head made of one backbone's tokens; n patches may differ between backbones."""

    probability: NDArray[np.float64]
    """``(k, n, C)``."""
    truth: NDArray[np.bool_]
    """``(k, n, C)``."""
    majority: NDArray[np.integer] | None
    """``(k, n)``, the class with most pixels of each patch, where it is known."""
    grid: tuple[int, int]


def predicted_by(arrays: Arrays, name: str, count: int) -> Predicted:
    """One backbone's side of the first ``count`` images.

    Args:
        arrays: ``probability_<name>``, ``truth`` and ``grid``, maybe ``majority``; where the backbone has a
            grid of its own, ``truth_<name>`` and ``grid_<name>``, maybe ``majority_<name>``.
        name: The backbone.
        count: How many images.
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


def predicted_names(arrays: Arrays) -> list[str]:
    """Backbones whose predictions the arrays hold, in order."""
    head = "probability_"
    return [name.removeprefix(head) for name in arrays if name.startswith(head)]


@styled
def predictions_figure(arrays: Arrays, names: Mapping[str, str] | None = None) -> Figure:
    """Image, truth, and all classes that a local-task head finds in each patch, backbone by backbone.

    Args:
        arrays: ``images``, ``truth``, ``class_names``, ``grid`` and ``probability_...`` of
            :func:`localign.pictures.gather_pictures`.
        names: Backbones to show, and what to call them; ``baseline`` and ``aligned`` by default.
    """
    names = names or {"baseline": "baseline", "aligned": "aligned"}
    count = min(MAX_IMAGES, len(arrays["images"]))
    sides = [predicted_by(arrays, name, count) for name in names]
    truth = sides[0].truth
    seen = truth.sum((0, 1)) + sum((s.probability > THRESHOLD).sum((0, 1)) for s in sides)
    marks = class_marks([str(n) for n in arrays["class_names"]], np.asarray(seen, dtype=np.float64))
    rows, columns = sides[0].grid
    titles = ("image", "truth", *(f"predicted: {shown}" for shown in names.values()))
    side = 2.35
    figure = new_figure(side * len(titles) + 0.2, (side * rows / columns + 0.28) * count + 0.95)
    axes = figure.subplots(count, len(titles), squeeze=False)
    for i in range(count):
        show(axes[i, 0], arrays["images"][i].transpose(1, 2, 0))
        _draw_patches(axes[i, 1], truth[i].astype(np.float64), None, sides[0].grid, marks, side)
        for ax, found in zip(axes[i, 2:], sides, strict=True):
            wrong = wrong_patches(found.probability[i], found.truth[i])
            _draw_patches(ax, found.probability[i], wrong, found.grid, marks, side)
            below(ax, f"{int(wrong.sum())} of {len(wrong)} patches wrong")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    handles = _legend(marks)
    columns = _legend_columns([str(h.get_label()) for h in handles], figure.get_figwidth())
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.4)
    return figure


def _draw_patches(
    ax: Axes,
    probability: NDArray[np.float64],
    wrong: NDArray[np.bool_] | None,
    grid: tuple[int, int],
    marks: Sequence[ClassMark],
    inches: float,
) -> None:
    """One cell per patch: stripes of the fills, and the signs, of its classes above the threshold."""
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
    """Sure is solid; at the threshold a quarter is left."""
    return 0.25 + 0.75 * float(np.clip((probability - THRESHOLD) / (1 - THRESHOLD), 0, 1))


def _legend(marks: Sequence[ClassMark]) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = []
    for mark in marks:
        if not mark.in_legend:
            continue
        label = mark.name if len(mark.name) <= 22 else mark.name[:21] + "…"
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
    return handles


def _legend_columns(labels: Sequence[str], inches: float) -> int:
    """As many columns as fit beside each other, each as wide as its longest label."""
    for count in range(min(7, len(labels)), 1, -1):
        columns = np.array_split(np.asarray([len(label) for label in labels]), count)
        if sum(0.075 * column.max() + 0.5 for column in columns) <= inches:
            return count
    return 1


# -- feature maps ----------------------------------------------------------------------------------------


@styled
def features_figure(arrays: Arrays) -> Figure:
    """The image, and its patch tokens coloured by their first three principal components.

    Args:
        arrays: ``images``, ``grid`` and ``pca_...`` with ``..._share`` of ``baseline`` and ``aligned``.
    """
    count = min(MAX_IMAGES, len(arrays["images"]))
    grid = tuple(int(v) for v in arrays["grid"])
    figure = new_figure(1.62 * count + 0.35, 3 * 1.62 * grid[0] / grid[1] + 0.5)
    axes = figure.subplots(3, count, squeeze=False)
    for i in range(count):
        show(axes[0, i], arrays["images"][i].transpose(1, 2, 0))
    axes[0, 0].set_ylabel("image")
    for row, name in enumerate(("baseline", "aligned"), start=1):
        colours = component_colours(arrays[f"pca_{name}"])
        for i in range(count):
            show(axes[row, i], colours[i].reshape(*grid, 3))
        share = float(np.sum(arrays[f"pca_{name}_share"]))
        axes[row, 0].set_ylabel(f"{name}\n({share:.0%} of variance)")
    return figure


# -- reconstructions -------------------------------------------------------------------------------------


@styled
def reconstructions_figure(arrays: Arrays) -> Figure:
    """What the teacher sees of each view, its tokens, and the student's reconstruction of them.

    Args:
        arrays: ``images``, ``grid``, ``patch_size``, ``mean_colour``, ``keep_masks``, ``target``,
            ``reconstruction`` and ``view_error``.
    """
    masks = int(arrays["keep_masks"].shape[1])
    count = min(MAX_RECONSTRUCTED, len(arrays["images"]))
    grid = tuple(int(v) for v in arrays["grid"])
    target, guess = _token_colours(arrays, grid)
    side = 1.14
    figure = new_figure(3 * side * masks, (side * grid[0] / grid[1] + 0.24) * count + 0.55)
    groups = figure.subfigures(1, masks, squeeze=False, wspace=0.03)[0]
    for view, group in enumerate(groups):
        group.suptitle(_view_name(view, masks), fontsize=10, fontweight="bold")
        axes = group.subplots(count, 3, squeeze=False)
        given = "its tokens" if arrays["target"].ndim == 4 else "its cls token"
        for ax, title in zip(axes[0], ("teacher sees", given, "student"), strict=True):
            ax.set_title(title, fontsize=8.5)
        for i in range(count):
            _draw_view(axes[i, 0], arrays, i, view)
            show(axes[i, 1], target[i, view])
            show(axes[i, 2], guess[i, view])
            below(axes[i, 0], f"{float(arrays['keep_masks'][i, view].mean()):.0%} visible")
            below(axes[i, 2], f"error {float(arrays['view_error'][i, view]):.2f}")
    return figure


def _token_colours(arrays: Arrays, grid: tuple[int, ...]) -> list[NDArray[np.float64]]:
    """Target and reconstruction as ``(k, masks, rows, columns, 3)``: a cell is a patch, or a channel of one token."""
    target, guess = arrays["target"], arrays["reconstruction"]
    if target.ndim == 4:
        colours = [component_colours(target), component_colours(guess, target)]
    else:
        width = target.shape[-1]
        rows = next(r for r in range(int(width**0.5), 0, -1) if width % r == 0)
        grid = (rows, width // rows)
        scaled = [np.clip(values / (2 * CHANNEL_RANGE) + 0.5, 0, 1) for values in (target, guess)]
        colours = [CHANNEL_COLOURS(values)[..., :3] for values in scaled]
    return [c.reshape(*c.shape[:2], *grid, 3) for c in colours]


def _view_name(view: int, masks: int) -> str:
    return VIEW_NAMES[view] if masks == len(VIEW_NAMES) else f"view {view + 1}"


def _draw_view(ax: Axes, arrays: Arrays, image: int, view: int) -> None:
    """The image with hidden patches in the mean colour, and strokes that tell them from a grey ground."""
    pixels = arrays["images"][image].transpose(1, 2, 0) / 255.0
    rows, columns = (int(v) for v in arrays["grid"])
    height, width = (int(v) for v in arrays["patch_size"])
    keep = arrays["keep_masks"][image, view].reshape(rows, columns)
    shown = np.zeros(pixels.shape[:2], dtype=bool)
    shown[: rows * height, : columns * width] = keep.repeat(height, 0).repeat(width, 1)
    show(ax, np.where(shown[..., None], pixels, arrays["mean_colour"]))
    strokes = []
    for y, x in np.argwhere(~keep):
        left, top = x * width - 0.5, y * height - 0.5
        strokes.append([(left + 0.2 * width, top + 0.8 * height), (left + 0.8 * width, top + 0.2 * height)])
    ax.add_collection(LineCollection(strokes, colors="white", linewidths=0.6, alpha=0.8))


# -- axes ------------------------------------------------------------------------------------------------


def show(ax: Axes, picture: NDArray[Any]) -> None:
    """An image without axes, its pixels as they are."""
    ax.imshow(picture, interpolation="nearest")
    bare(ax)


def bare(ax: Axes, frame: bool = False) -> None:
    """Axes without grid, ticks and, unless asked for, frame."""
    ax.grid(visible=False)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(frame)


def below(ax: Axes, text: str) -> None:
    """Small words under a picture."""
    ax.set_xlabel(text, fontsize=8, color=MUTED, labelpad=3)
