"""Masks and crops (fig. 10): the views of a teacher under MaskEmbed and under CLIPSelf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch.nn import functional

from localign.report.captions import Words
from localign.report.figures.drawing import Drawing, below, show
from localign.report.style import ALIGNED, BASELINE, new_figure, styled

Window = tuple[int, int, int, int]
"""top, left, height, width, in patches."""
HEADER = ("image", "view", "visible_share", "top", "left", "height", "width")
_SIDES = ("mask", "complement")
_OUTLINES = (ALIGNED, BASELINE)


@dataclass(frozen=True)
class Views:
    """A few images and the masks and crops to show of them."""

    images: NDArray[np.uint8]
    """``(k, 3, H, W)``."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    masks: Mapping[str, NDArray[np.bool_]]
    """Title to ``(k, 2, n)``: a mask and its complement per image, True = visible."""
    windows: Sequence[Sequence[Window]]
    """The crops of each image, equally many for all images."""


def views_drawing(views: Views, name: str = "masks_and_crops") -> Drawing:
    """Masks with their complements, and crops, of a few images.

    Args:
        views: What to draw.
        name: Name of the files.
    """
    rows: list[tuple[Any, ...]] = []
    patches = views.grid[0] * views.grid[1]
    for i, windows in enumerate(views.windows):
        for title, pairs in views.masks.items():
            rows += [
                (i, f"{title}, {side}", float(keep.mean()), "", "", "", "")
                for side, keep in zip(_SIDES, pairs[i], strict=True)
            ]
        rows += [(i, "crop", window[2] * window[3] / patches, *window) for window in windows]
    return Drawing(name, views_figure(views), _WORDS, HEADER, tuple(rows), vector=False)


@styled
def views_figure(views: Views) -> Figure:
    """One line per image: the image, each mask and its complement, the windows, and each crop at full size."""
    images, grid, masks, windows = views.images, views.grid, views.masks, views.windows
    crops = len(windows[0])
    side = 1.22
    groups = [1, *(2 for _ in masks), 1 + crops]
    height, width = images.shape[-2:]
    figure = new_figure(side * sum(groups) + 0.35, (side * height / width + 0.22) * len(images) + 0.55)
    parts = figure.subfigures(1, len(groups), width_ratios=groups, squeeze=False)[0]
    titles = ["image", *masks, "crops"]
    for part, title in zip(parts, titles, strict=True):
        part.suptitle(title, fontsize=9.5, fontweight="bold")
    axes = [part.subplots(len(images), n, squeeze=False) for part, n in zip(parts, groups, strict=True)]
    for i, image in enumerate(images):
        picture = image.transpose(1, 2, 0)
        show(axes[0][i, 0], picture)
        below(axes[0][i, 0], " ")
        for group, pair in zip(axes[1:-1], masks.values(), strict=True):
            for ax, keep in zip(group[i], pair[i], strict=True):
                show(ax, masked(picture, keep, grid))
                below(ax, f"{keep.mean():.0%} visible")
        _draw_windows(axes[-1][i, 0], picture, windows[i], grid)
        for k, (ax, window) in enumerate(zip(axes[-1][i, 1:], windows[i], strict=True)):
            show(ax, crop(picture, window, grid))
            for spine in ax.spines.values():
                spine.set(visible=True, color=_OUTLINES[k % len(_OUTLINES)], linewidth=1.8)
            below(ax, f"{window[2]}×{window[3]} patches")
    headings = [[" "], *(list(_SIDES) for _ in masks), ["windows", *["teacher sees"] * crops]]
    for group, texts in zip(axes, headings, strict=True):
        for ax, text in zip(group[0], texts, strict=True):
            ax.set_title(text, fontsize=8)
    return figure


def _edges(pixels: int, patches: int) -> NDArray[np.int64]:
    """Pixel positions of the patch borders; pixels after the last whole patch belong to none."""
    return np.arange(patches + 1) * (pixels // patches)


def masked(picture: NDArray[np.uint8], keep: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture ``(H, W, 3)`` with hidden patches, and pixels that belong to no patch, in mid-grey."""
    visible = np.zeros(picture.shape[:2], dtype=bool)
    ys, xs = _edges(picture.shape[0], grid[0]), _edges(picture.shape[1], grid[1])
    visible[: ys[-1], : xs[-1]] = keep.reshape(grid).repeat(ys[1], 0).repeat(xs[1], 1)
    return np.where(visible[..., None], picture, np.uint8(128))


def crop(picture: NDArray[np.uint8], window: Window, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """The window of a picture ``(H, W, 3)``, scaled bilinearly to the size of the picture."""
    top, left, height, width = window
    ys, xs = _edges(picture.shape[0], grid[0]), _edges(picture.shape[1], grid[1])
    part = picture[ys[top] : ys[top + height], xs[left] : xs[left + width]]
    pixels = torch.from_numpy(part.transpose(2, 0, 1).astype(np.float32))[None]
    scaled = functional.interpolate(pixels, size=picture.shape[:2], mode="bilinear", align_corners=False)
    return scaled[0].permute(1, 2, 0).round().clamp(0, 255).numpy().astype(np.uint8)


def _draw_windows(
    ax: Axes, picture: NDArray[np.uint8], windows: Sequence[Window], grid: tuple[int, int]
) -> None:
    show(ax, picture)
    ys, xs = _edges(picture.shape[0], grid[0]), _edges(picture.shape[1], grid[1])
    for k, (top, left, height, width) in enumerate(windows):
        ax.add_patch(
            Rectangle(
                (xs[left] - 0.5, ys[top] - 0.5), xs[left + width] - xs[left], ys[top + height] - ys[top],
                facecolor="none", edgecolor=_OUTLINES[k % len(_OUTLINES)], linewidth=1.8,
                clip_on=False,
            )
        )  # fmt: skip
    below(ax, " ")


_WORDS: Words = (
    "Images under uniform, Bernoulli and block masks with their complements, and grid-aligned crops of them.",
    "What the teacher sees. MaskEmbed hides patches (grey here, the mean colour in training) and also uses the "
    "complement; CLIPSelf cuts out a window aligned with the grid of patches and enlarges it.",
)
