"""Masks and crops (fig. 10): what a teacher gets to see under MaskEmbed and under CLIPSelf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from localign import rng
from localign.alignment.masks import MaskSampler
from localign.options.names import MaskKind
from localign.report.captions import Words
from localign.report.figures.drawing import Drawing
from localign.report.pictures import below, show
from localign.report.style import ALIGNED, BASELINE, new_figure, styled

MAX_IMAGES = 4
CROPS = 2
"""Crops of each image."""
SMALLEST_CROP = 3
"""Patches a side."""
Window = tuple[int, int, int, int]
"""top, left, height, width, in patches."""
HEADER = ("image", "view", "visible_share", "top", "left", "height", "width")
_KINDS: dict[str, MaskKind] = {
    "uniform mask": "uniform",
    "Bernoulli mask (50 %)": "bernoulli",
    "block mask": "block",
}
_SIDES = ("mask", "complement")
_OUTLINES = (ALIGNED, BASELINE)


def draw_masks(count: int, grid: tuple[int, int], seed: int = 0) -> dict[str, NDArray[np.bool_]]:
    """One mask of each kind per image, with its complement: bool ``(count, 2, n)``, True = visible."""
    positions = torch.arange(count)
    smallest = max(1, min(16, grid[0] * grid[1] // 8))
    masks = {}
    for k, (title, kind) in enumerate(_KINDS.items()):
        sampler = MaskSampler(kind=kind, all_visible=False, block_min_patches=smallest)
        masks[title] = sampler(rng.key(seed, "views", k) >> 1, positions, grid).numpy()
    return masks


def draw_windows(count: int, grid: tuple[int, int], seed: int = 0) -> list[list[Window]]:
    """Grid-aligned windows per image: sides uniform from three patches to all, then uniformly placed."""
    windows: list[list[Window]] = []
    for i in range(count):
        draw = rng.generator(seed, "crop-view", i)
        mine = []
        for _ in range(CROPS):
            height, width = (int(draw.integers(min(SMALLEST_CROP, side), side + 1)) for side in grid)
            top, left = int(draw.integers(grid[0] - height + 1)), int(draw.integers(grid[1] - width + 1))
            mine.append((top, left, height, width))
        windows.append(mine)
    return windows


def views_drawing(
    images: Tensor | NDArray[np.uint8],
    grid: tuple[int, int],
    *,
    masks: Mapping[str, NDArray[np.bool_]] | None = None,
    windows: Sequence[Sequence[Window]] | None = None,
    seed: int = 0,
    name: str = "masks_and_crops",
) -> Drawing:
    """Uniform, Bernoulli and block masks with their complements, and crops, of a few images.

    Args:
        images: uint8 ``(k, 3, H, W)``.
        grid: Rows and columns of patches.
        masks: Title to bool ``(k, 2, n)``; drawn from the seed where missing.
        windows: Of each image, the same number of crops; drawn from the seed where missing.
        seed: Of what is drawn.
        name: Of the files.
    """
    pixels = np.asarray(images)[:MAX_IMAGES]
    count = len(pixels)
    masks = masks or draw_masks(count, grid, seed)
    windows = windows or draw_windows(count, grid, seed)
    rows: list[tuple[Any, ...]] = []
    for i in range(count):
        seen = [(f"{t}, {s}", k) for t, pair in masks.items() for s, k in zip(_SIDES, pair[i], strict=True)]
        rows += [(i, view, float(keep.mean()), "", "", "", "") for view, keep in seen]
        rows += [(i, "crop", w[2] * w[3] / (grid[0] * grid[1]), *w) for w in windows[i]]
    return Drawing(
        name, views_figure(pixels, grid, masks, windows), _WORDS, HEADER, tuple(rows), vector=False
    )


@styled
def views_figure(
    images: NDArray[np.uint8],
    grid: tuple[int, int],
    masks: Mapping[str, NDArray[np.bool_]],
    windows: Sequence[Sequence[Window]],
) -> Figure:
    """One line per image: the image, each mask and its complement, the windows, and each crop resized.

    Args:
        images: uint8 ``(k, 3, H, W)``.
        grid: Rows and columns of patches.
        masks: Title to bool ``(k, 2, n)``.
        windows: Of each image, its crops.
    """
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
    """Where patches begin; pixels beyond the last whole one belong to none."""
    return np.arange(patches + 1) * (pixels // patches)


def masked(picture: NDArray[np.uint8], keep: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.uint8]:
    """``(H, W, 3)`` with hidden patches, and pixels of no patch, in mid-grey."""
    shown = np.zeros(picture.shape[:2], dtype=bool)
    ys, xs = _edges(picture.shape[0], grid[0]), _edges(picture.shape[1], grid[1])
    shown[: ys[-1], : xs[-1]] = keep.reshape(grid).repeat(ys[1], 0).repeat(xs[1], 1)
    return np.where(shown[..., None], picture, np.uint8(128))


def crop(picture: NDArray[np.uint8], window: Window, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """The window of ``(H, W, 3)``, scaled bilinearly to the whole size."""
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
    "What the teacher gets to see. MaskEmbed hides patches (grey here; the mean colour in training) and also "
    "uses the complement; CLIPSelf cuts out a window aligned with the grid of patches and scales it up.",
)
