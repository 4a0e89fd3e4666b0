"""Keep-masks over patches (section 3.2 and Table 4 of the paper). True always means visible."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from localign import rng
from localign.alignment.shapley import kernel_cardinalities
from localign.errors import UserError
from localign.options.align import MaskOptions

_BLOCK_ASPECT = 0.3
_BLOCK_ATTEMPTS = 10_000


@dataclass(frozen=True)
class MaskSampler(MaskOptions):
    """Draws the masks of each image as a function of the seed and the image's global position."""

    @classmethod
    def of(cls, options: MaskOptions) -> MaskSampler:
        """The sampler with these options."""
        return cls(**vars(options))

    def check(self, grid: tuple[int, int]) -> None:
        """Refuse a grid on which the masks do not fit.

        Raises:
            UserError: The smallest block is larger than the area to hide or does not fit into the grid, or shapley
                masks get fewer than two patches.
        """
        if self.kind == "shapley" and grid[0] * grid[1] < 2:
            raise UserError(
                "shapley masks show some patches and hide others; they need a grid of two or more patches"
            )
        if self.kind == "block":
            hidden = round((1 - self.keep_ratio) * grid[0] * grid[1])
            if self.block_min_patches > hidden:
                raise UserError(
                    f"blocks of at least {self.block_min_patches} patches do not fit: on a {grid[0]}x{grid[1]} "
                    f"grid, keep ratio {self.keep_ratio} hides {hidden}"
                )
            if not _smallest_block_fits(self.block_min_patches, grid):
                raise UserError(
                    f"blocks of {self.block_min_patches} patches do not fit: a {grid[0]}x{grid[1]} grid is too narrow"
                )

    def __call__(self, seed: int, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        """Draw masks.

        Args:
            seed: The run's seed.
            positions: int64 ``(batch,)``, global positions in the stream of samples.
            grid: Rows and columns of patches.

        Returns:
            bool ``(batch, masks_per_image, rows * columns)`` on the CPU, True = visible. The order is mask, complement,
            all-visible.
        """
        self.check(grid)
        drawn = _SAMPLERS[self.kind](self, seed, positions, grid)
        masks = [drawn]
        if self.complement:
            masks.append(~drawn)
        if self.all_visible:
            masks.append(torch.ones_like(drawn))
        return torch.stack(masks, dim=1)


def _uniform(sampler: MaskSampler, seed: int, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    n = grid[0] * grid[1]
    draws = rng.uniform(seed, "mask", positions, n + 1)
    return _keep_at_random(draws[:, 1:], (draws[:, :1] * (n + 1)).floor())


def _shapley(sampler: MaskSampler, seed: int, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    n = grid[0] * grid[1]
    draws = rng.uniform(seed, "mask", positions, n + 1)
    cardinality = torch.searchsorted(kernel_cardinalities(n).cumsum(0), draws[:, :1].contiguous(), right=True)
    return _keep_at_random(draws[:, 1:], cardinality.clamp(max=n - 1))


def _keep_at_random(draws: Tensor, cardinality: Tensor) -> Tensor:
    """Keep the patches with the smallest draws; ``cardinality``, ``(batch, 1)``, is the number of kept patches."""
    ranks = draws.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < cardinality


def _bernoulli(sampler: MaskSampler, seed: int, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    return rng.uniform(seed, "mask", positions, grid[0] * grid[1]) < sampler.keep_ratio


def _block(sampler: MaskSampler, seed: int, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    masks = [_one_block_mask(sampler, rng.generator(seed, "mask", int(p)), grid) for p in positions]
    return torch.from_numpy(np.stack(masks)).flatten(1)


def _one_block_mask(sampler: MaskSampler, draw: np.random.Generator, grid: tuple[int, int]) -> np.ndarray:
    rows, columns = grid
    keep = np.ones(grid, dtype=bool)
    target = round((1 - sampler.keep_ratio) * rows * columns)
    log_aspect = abs(math.log(_BLOCK_ASPECT))
    for _ in range(_BLOCK_ATTEMPTS):
        left = target - int((~keep).sum())
        if left <= 0:
            return keep
        area = draw.uniform(sampler.block_min_patches, max(left, sampler.block_min_patches))
        height, width = _block_sides(area, math.exp(draw.uniform(-log_aspect, log_aspect)), grid)
        if height * width < sampler.block_min_patches:
            continue
        top, side = draw.integers(0, rows - height + 1), draw.integers(0, columns - width + 1)
        keep[top : top + height, side : side + width] = False
    raise UserError(
        f"cannot hide {target} patches of a {rows}x{columns} grid with blocks; use a larger keep ratio"
    )


def _block_sides(area: float, aspect: float, grid: tuple[int, int]) -> tuple[int, int]:
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return min(grid[0], max(1, height)), min(grid[1], max(1, width))


def _smallest_block_fits(patches: int, grid: tuple[int, int]) -> bool:
    """Whether some aspect ratio gives a block of ``patches``. Otherwise the last gap could never be covered."""
    aspects = np.geomspace(_BLOCK_ASPECT, 1 / _BLOCK_ASPECT, 101)
    return any(math.prod(_block_sides(patches, float(aspect), grid)) >= patches for aspect in aspects)


_SAMPLERS = {"uniform": _uniform, "bernoulli": _bernoulli, "block": _block, "shapley": _shapley}
