"""Maps of patch features, and reconstructions of the teacher's tokens. Arrays in, figures out."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from localign.report.figures.drawing import below, show
from localign.report.figures.predictions import MAX_IMAGES
from localign.report.style import new_figure, styled
from localign.results import Pictures

MAX_RECONSTRUCTED = 4
"""Images of the reconstruction figure."""
SIDES = ("baseline", "aligned")
VIEW_NAMES = ("mask", "complement", "all visible")
CHANNEL_COLOURS = matplotlib.colormaps["PuOr"]
CHANNEL_RANGE = 2.5
"""Standard deviations at which a channel has full colour."""


def component_colours(
    scores: NDArray[np.floating], reference: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Three component scores as red, green and blue.

    Args:
        scores: ``(..., 3)``.
        reference: Scores ``(..., 3)`` that set the scale, ``scores`` by default: for each component, its 1st
            percentile becomes 0 and its 99th becomes 1.

    Returns:
        float64, same shape, in 0..1.
    """
    flat = (scores if reference is None else reference).astype(np.float64).reshape(-1, 3)
    low, high = np.percentile(flat, [1, 99], axis=0)
    return np.asarray(np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1), dtype=np.float64)


def has_joint_basis(arrays: Pictures) -> bool:
    """Whether the arrays hold the patch tokens of both sides in one basis."""
    return all(f"joint_{side}{part}" in arrays for side in SIDES for part in ("", "_share"))


@styled
def features_figure(arrays: Pictures) -> Figure:
    """Images, and their patch tokens before and after alignment, coloured by three principal components.

    Args:
        arrays: ``images``, ``grid``, and ``joint_<side>`` and ``joint_<side>_share`` for both sides, which share one
            basis and one range of colours; without these, as in files of version 0.1.0, ``pca_<side>`` and
            ``pca_<side>_share``.
    """
    kind = "joint" if has_joint_basis(arrays) else "pca"
    reference = np.stack([arrays[f"joint_{side}"] for side in SIDES]) if kind == "joint" else None
    count = min(MAX_IMAGES, len(arrays["images"]))
    grid = tuple(int(v) for v in arrays["grid"])
    figure = new_figure(1.62 * count + 0.35, 3 * 1.62 * grid[0] / grid[1] + 0.5)
    axes = figure.subplots(3, count, squeeze=False)
    for i in range(count):
        show(axes[0, i], arrays["images"][i].transpose(1, 2, 0))
    axes[0, 0].set_ylabel("image")
    for row, name in enumerate(SIDES, start=1):
        colours = component_colours(arrays[f"{kind}_{name}"], reference)
        for i in range(count):
            show(axes[row, i], colours[i].reshape(*grid, 3))
        share = float(np.sum(arrays[f"{kind}_{name}_share"]))
        axes[row, 0].set_ylabel(f"{name}\n({share:.0%} of variance)")
    return figure


@styled
def reconstructions_figure(arrays: Pictures) -> Figure:
    """For each view, the image as the teacher sees it, the teacher's tokens, and the student's reconstruction.

    Args:
        arrays: ``images``, ``grid``, ``patch_size``, ``mean_colour``, ``keep_masks``, ``target``,
            ``reconstruction`` and ``view_error``.
    """
    masks = int(arrays["keep_masks"].shape[1])
    count = min(MAX_RECONSTRUCTED, len(arrays["images"]))
    grid = tuple(int(v) for v in arrays["grid"])
    target, reconstruction = _token_colours(arrays, grid)
    side = 1.14
    figure = new_figure(3 * side * masks, (side * grid[0] / grid[1] + 0.24) * count + 0.55)
    groups = figure.subfigures(1, masks, squeeze=False, wspace=0.03)[0]
    for view, group in enumerate(groups):
        group.suptitle(_view_name(view, masks), fontsize=10, fontweight="bold")
        axes = group.subplots(count, 3, squeeze=False)
        teacher_title = "its tokens" if arrays["target"].ndim == 4 else "its cls token"
        for ax, title in zip(axes[0], ("teacher sees", teacher_title, "student"), strict=True):
            ax.set_title(title, fontsize=8.5)
        for i in range(count):
            _draw_view(axes[i, 0], arrays, i, view)
            show(axes[i, 1], target[i, view])
            show(axes[i, 2], reconstruction[i, view])
            below(axes[i, 0], f"{float(arrays['keep_masks'][i, view].mean()):.0%} visible")
            below(axes[i, 2], f"error {float(arrays['view_error'][i, view]):.2f}")
    return figure


def _token_colours(arrays: Pictures, grid: tuple[int, ...]) -> list[NDArray[np.float64]]:
    """Target and reconstruction as ``(k, masks, rows, columns, 3)``.

    A cell is a patch if the target is patch tokens, and a channel if the target is the class token.
    """
    target, reconstruction = arrays["target"], arrays["reconstruction"]
    if target.ndim == 4:
        colours = [component_colours(target), component_colours(reconstruction, target)]
    else:
        width = target.shape[-1]
        rows = next(r for r in range(int(width**0.5), 0, -1) if width % r == 0)
        grid = (rows, width // rows)
        scaled = [np.clip(values / (2 * CHANNEL_RANGE) + 0.5, 0, 1) for values in (target, reconstruction)]
        colours = [CHANNEL_COLOURS(values)[..., :3] for values in scaled]
    return [c.reshape(*c.shape[:2], *grid, 3) for c in colours]


def _view_name(view: int, masks: int) -> str:
    return VIEW_NAMES[view] if masks == len(VIEW_NAMES) else f"view {view + 1}"


def _draw_view(ax: Axes, arrays: Pictures, image: int, view: int) -> None:
    """The image with hidden patches in the mean colour, and struck through to tell them from grey image content."""
    pixels = arrays["images"][image].transpose(1, 2, 0) / 255.0
    rows, columns = (int(v) for v in arrays["grid"])
    height, width = (int(v) for v in arrays["patch_size"])
    keep = arrays["keep_masks"][image, view].reshape(rows, columns)
    visible = np.zeros(pixels.shape[:2], dtype=bool)
    visible[: rows * height, : columns * width] = keep.repeat(height, 0).repeat(width, 1)
    show(ax, np.where(visible[..., None], pixels, arrays["mean_colour"]))
    strokes = []
    for y, x in np.argwhere(~keep):
        left, top = x * width - 0.5, y * height - 0.5
        strokes.append([(left + 0.2 * width, top + 0.8 * height), (left + 0.8 * width, top + 0.2 * height)])
    ax.add_collection(LineCollection(strokes, colors="white", linewidths=0.6, alpha=0.8))
