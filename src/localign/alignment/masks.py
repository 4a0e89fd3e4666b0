"""Keep-masks over patches (section 3.2 and Table 4 of the paper). True always means visible."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from localign import rng
from localign.alignment.shapley import kernel_cardinalities
from localign.errors import UserError
from localign.options.align import MaskOptions

_BLOCK_ASPECT = 0.3


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
            UserError: The smallest block is as large as the grid, or shapley masks get fewer than two patches.
        """
        if self.kind == "shapley" and grid[0] * grid[1] < 2:
            raise UserError(
                "shapley masks show some patches and hide others; they need a grid of two or more patches"
            )
        if self.kind == "block" and self.block_min_patches >= grid[0] * grid[1]:
            raise UserError(
                f"blocks of at least {self.block_min_patches} patches do not fit: they uncover a whole "
                f"{grid[0]}x{grid[1]} grid; set a smaller --block-min-patches"
            )

    def visible_share(self, grid: tuple[int, int], samples: int = 1000) -> float:
        """The mean share of visible patches of the drawn masks, without complements and all-visible masks."""
        alone = replace(self, complement=False, all_visible=False)
        return float(alone(0, torch.arange(samples), grid).float().mean())

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
    keep = np.zeros(grid, dtype=bool)
    target = sampler.keep_ratio * rows * columns
    while keep.sum() < target:
        height, width = _block_sides(sampler, draw, grid)
        top, left = draw.integers(0, rows - height + 1), draw.integers(0, columns - width + 1)
        keep[top : top + height, left : left + width] = True
    return keep


def _block_sides(sampler: MaskSampler, draw: np.random.Generator, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of one rectangle. The roundings are those that give the published rates of visibility."""
    area = int(draw.integers(sampler.block_min_patches, _largest_block(sampler, grid) + 1))
    height = math.ceil(math.sqrt(area * draw.uniform(_BLOCK_ASPECT, 1 / _BLOCK_ASPECT)))
    return min(grid[0], height), min(grid[1], max(1, area // height))


def _largest_block(sampler: MaskSampler, grid: tuple[int, int]) -> int:
    """The largest area of a block, in patches, before its sides are rounded: the share to uncover."""
    return max(sampler.block_min_patches, int(sampler.keep_ratio * grid[0] * grid[1]))


_SAMPLERS = {"uniform": _uniform, "bernoulli": _bernoulli, "block": _block, "shapley": _shapley}
