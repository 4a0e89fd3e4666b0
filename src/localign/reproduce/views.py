"""Fig. 10: masks and crops of a few images, which needs no training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from localign import rng
from localign.alignment.masks import MaskSampler
from localign.backbones import create_backbone
from localign.options.names import MaskKind
from localign.options.reproduce import ReproduceConfig
from localign.probing.segmentation import labelled_batches
from localign.report import write_figure
from localign.report.figures.views import Views, Window
from localign.reproduce.pieces import LabelledData
from localign.reproduce.worlds import DataScale

BACKBONE = "clip-vit-b"
"""The backbone whose grid of patches is shown, outside the scenes."""
IMAGES = 4
CROPS = 2
"""Crops of each image."""
SMALLEST_CROP = 3
"""Smallest side of a crop, patches."""
_KINDS: dict[str, MaskKind] = {
    "uniform mask": "uniform",
    "Bernoulli mask (50 %)": "bernoulli",
    "block mask": "block",
}


def draw_masks(count: int, grid: tuple[int, int], seed: int = 0) -> dict[str, NDArray[np.bool_]]:
    """One mask of each kind per image, with its complement: title to bool ``(count, 2, n)``, True = visible."""
    positions = torch.arange(count)
    smallest = max(1, min(16, grid[0] * grid[1] // 8))
    masks = {}
    for k, (title, kind) in enumerate(_KINDS.items()):
        sampler = MaskSampler(kind=kind, all_visible=False, block_min_patches=smallest)
        masks[title] = sampler(rng.key(seed, "views", k) >> 1, positions, grid).numpy()
    return masks


def draw_windows(count: int, grid: tuple[int, int], seed: int = 0) -> list[list[Window]]:
    """Grid-aligned windows of each image: sides uniform from three patches to all, then uniformly placed."""
    windows: list[list[Window]] = []
    for i in range(count):
        generator = rng.generator(seed, "crop-view", i)
        crops = []
        for _ in range(CROPS):
            height, width = (int(generator.integers(min(SMALLEST_CROP, side), side + 1)) for side in grid)
            top = int(generator.integers(grid[0] - height + 1))
            left = int(generator.integers(grid[1] - width + 1))
            crops.append((top, left, height, width))
        windows.append(crops)
    return windows


def write_views(config: ReproduceConfig, world: DataScale, data: LabelledData, folder: Path) -> list[Path]:
    """Write fig. 10, of the first test images; returns the paths of the files."""
    if world.backbone is None:
        with torch.device("meta"):  # only the geometry is needed
            backbone = create_backbone(BACKBONE, weights="none")
    else:
        backbone = create_backbone(world.backbone)
    images, _ = next(labelled_batches(data.test, backbone.image_size, IMAGES))
    grid = backbone.grid
    views = Views(images.numpy(), grid, draw_masks(len(images), grid), draw_windows(len(images), grid))
    return write_figure(config.target, {}, folder, views=views)
