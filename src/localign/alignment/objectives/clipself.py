"""CLIPSelf (appendix B.3 of the paper): features averaged in a window reproduce the teacher's output for the crop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localign import rng
from localign.alignment.objectives.base import Objective, visible_mean
from localign.engine.verdict import runs_ahead

SMALLEST_SHARE = 3 / 14
"""Smallest side of a crop as a share of the grid's side: 3 of the 14 patches of ViT-B/16 at 224 pixels."""


class CLIPSelf(Objective):
    """One crop per image, aligned with the patch grid and enlarged for the teacher.

    The student sees the whole image. Without a decoder, the prediction is the mean of the patch embeddings in the
    window. With a decoder, embeddings outside the window are hidden, and the prediction is the decoder's first token,
    as in MaskEmbed.
    """

    method = "CLIPSelf"

    def drawing(self) -> Callable[[int, Tensor], Tensor]:
        """Windows, see :func:`draw_windows`."""
        return partial(draw_windows, grid=self.grid)

    def target(self, images: Tensor, views: Tensor) -> Tensor:
        """``(batch, width)``."""
        target: Tensor = self.teacher(crop_windows(images, views, self.grid, self.patch_size))
        return target

    def predict(self, model: nn.Module, images: Tensor, views: Tensor) -> Tensor:
        """``(batch, width)``."""
        inside = window_masks(views, self.grid)
        if self.decodes:
            output: Tensor = model(images, inside)[:, 0]
            return output
        return visible_mean(model(images)[:, self.num_prefix_tokens :], inside)


def smallest_side(patches: int) -> int:
    """Smallest side of a crop on a grid side of ``patches``: 3/14 of it, rounded, but at least 1. In patches."""
    return max(1, round(SMALLEST_SHARE * patches))


def draw_windows(seed: int, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Draw one window per image: height and width uniform and independent, then the position uniform.

    Args:
        seed: The run's seed.
        positions: int64 ``(batch,)``, global positions in the stream of samples.
        grid: Rows and columns of patches.

    Returns:
        int64 ``(batch, 4)`` on the CPU, in patches: top, left, height, width. Sides range from :func:`smallest_side` to
        the grid's side.
    """
    draws = rng.uniform(seed, "crop", positions, 4)
    largest = torch.tensor(grid)
    smallest = torch.tensor([smallest_side(side) for side in grid])
    sides = smallest + (draws[:, :2] * (largest - smallest + 1)).long()
    corners = (draws[:, 2:] * (largest - sides + 1)).long()
    return torch.cat([corners, sides], dim=1)


def window_masks(windows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Windows ``(batch, 4)`` as keep-masks: bool ``(batch, 1, rows * columns)``, True inside."""
    top, left, height, width = windows[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=windows.device) for side in grid)
    in_rows = (rows >= top) & (rows < top + height)
    in_columns = (columns >= left) & (columns < left + width)
    return (in_rows[:, :, None] & in_columns[:, None, :]).flatten(1)[:, None]


def crop_windows(images: Tensor, windows: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Crop each image to its window and enlarge the crop to the whole grid, bilinearly.

    Crops are never shrunk, so they need no antialiasing. Pixels to the right of and below the last full patch are 0, as
    in masked views.

    Args:
        images: Normalised, ``(batch, 3, height, width)``.
        windows: int64 ``(batch, 4)``, see :func:`draw_windows`.
        grid: Rows and columns of patches.
        patch: Patch height and width, pixels.

    Returns:
        Crops in the shape of ``images``.
    """
    full = grid[0] * patch[0], grid[1] * patch[1]
    below, right = images.shape[2] - full[0], images.shape[3] - full[1]
    if runs_ahead(images.device):
        return F.pad(sampled_windows(images, windows, full, patch), (0, right, 0, below))
    crops = []
    for image, (top, left, height, width) in zip(images, windows.tolist(), strict=True):
        rows = slice(top * patch[0], (top + height) * patch[0])
        columns = slice(left * patch[1], (left + width) * patch[1])
        cut = image[None, :, rows, columns]
        crops.append(F.interpolate(cut, size=full, mode="bilinear"))
    return F.pad(torch.cat(crops), (0, right, 0, below))


def sampled_windows(images: Tensor, windows: Tensor, size: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """The enlarged crops of :func:`crop_windows` in one operation, up to rounding, for devices that must not wait.

    Args:
        images, windows, patch: As for :func:`crop_windows`, on one device.
        size: Height and width of the enlarged crops, pixels.

    Returns:
        ``(batch, 3, *size)``.
    """
    axes = []
    for axis in (0, 1):
        first, length = windows[:, axis, None] * patch[axis], windows[:, axis + 2, None] * patch[axis]
        steps = torch.arange(size[axis], device=images.device) + 0.5
        inside = (steps * (length / size[axis]) - 0.5).clamp(min=0)  # pixels beside the crop do not count
        at = first + torch.minimum(inside, length - 1.0)
        axes.append(at * (2 / (images.shape[2 + axis] - 1)) - 1)
    rows, columns = axes[0][:, :, None], axes[1][:, None, :]
    points = torch.stack(torch.broadcast_tensors(columns, rows), dim=-1).to(images.dtype)
    return F.grid_sample(images, points, mode="bilinear", align_corners=True)
