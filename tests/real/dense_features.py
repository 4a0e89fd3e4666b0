"""What patch tokens of real photographs show: principal components as colours, and nearest patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from localign.backbones import Backbone
from localign.probing.datasets import open_labelled
from localign.probing.labels import reduce_labels
from localign.probing.segmentation import labelled_batches

TILE = 224


def photographs(data: Path, side: int, count: int) -> tuple[Tensor, Tensor]:
    """Photographs of the split val, uint8 ``(count, 3, side, side)``, and their label maps ``(count, side, side)``."""
    source = open_labelled(str(data / "coco-things"), "test")
    images, maps = next(labelled_batches(source, (side, side), count))
    return images, maps


def patch_tokens(backbone: Backbone, images: Tensor) -> Tensor:
    """Patch tokens after the last block, float32 ``(B, n, d)``, eight images at a time."""
    with torch.no_grad():
        parts = [backbone.tokens(backbone.normalise(part)) for part in images.split(8)]
    return torch.cat(parts)[:, backbone.num_prefix_tokens :]


def main_classes(backbone: Backbone, maps: Tensor, classes: int) -> Tensor:
    """The class with most pixels of every patch, int64 ``(B, n)``."""
    return reduce_labels(maps, backbone.patch_size, classes).majority


def nearest_elsewhere(tokens: Tensor) -> Tensor:
    """For every patch the patch of another image with the most similar token (cosine), flat indices ``(B * n,)``."""
    images, patches = tokens.shape[:2]
    flat = torch.nn.functional.normalize((tokens - tokens.mean((0, 1))).flatten(0, 1), dim=-1)
    similar = flat @ flat.T
    for image in range(images):
        own = slice(image * patches, (image + 1) * patches)
        similar[own, own] = -2
    return similar.argmax(dim=1)


def class_agreement(tokens: Tensor, classes: Tensor) -> float:
    """Share of the patches with a thing whose nearest patch in another image has the same class.

    The mean over classes that occur in at least two images.
    """
    nearest = classes.flatten()[nearest_elsewhere(tokens)].view_as(classes)
    shares = []
    for code in range(1, int(classes.max()) + 1):
        here = classes == code
        if int(here.any(dim=1).sum()) >= 2:
            shares.append(float((nearest[here] == code).float().mean()))
    return float(np.mean(shares))


def components_picture(images: Tensor, tokens: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Photographs above the first three principal components of their tokens, over all images, as red, green, blue."""
    flat = tokens.flatten(0, 1)
    flat = flat - flat.mean(0)
    colours = flat @ torch.pca_lowrank(flat, 3, niter=8)[2]
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    maps = ((colours - low) / (high - low)).clamp(0, 1).view(len(images), *grid, 3)
    rows = [[tile(image.permute(1, 2, 0).numpy()) for image in images]]
    rows.append([tile((255 * one).byte().numpy()) for one in maps])
    return pasted(rows)


def nearest_picture(
    images: Tensor, tokens: Tensor, grid: tuple[int, int], queries: Sequence[int]
) -> Image.Image:
    """For each query, a flat index of a patch: the photograph with the patch framed, and beside it its nearest."""
    nearest = nearest_elsewhere(tokens)
    rows = [[framed(images, grid, query), framed(images, grid, int(nearest[query]))] for query in queries]
    return pasted([list(column) for column in zip(*rows, strict=True)])


def framed(images: Tensor, grid: tuple[int, int], patch: int) -> NDArray[np.uint8]:
    """A photograph with a red frame around a patch, given by its flat index."""
    image, place = divmod(patch, grid[0] * grid[1])
    row, column = divmod(place, grid[1])
    picture = tile(images[image].permute(1, 2, 0).numpy()).copy()
    height, width = TILE // grid[0], TILE // grid[1]
    top, left = row * TILE // grid[0], column * TILE // grid[1]
    inner = picture[top + 3 : top + height - 3, left + 3 : left + width - 3].copy()
    picture[top : top + height, left : left + width] = (255, 0, 0)
    picture[top + 3 : top + height - 3, left + 3 : left + width - 3] = inner
    return picture


def tile(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image, uint8 ``(H, W, 3)``, at the size of a tile."""
    return np.asarray(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST))


def pasted(rows: Sequence[Sequence[NDArray[np.uint8]]]) -> Image.Image:
    """Rows of tiles as one picture."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))
