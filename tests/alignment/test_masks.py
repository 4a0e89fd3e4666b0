"""Masks of each sampler, for every combination of its options."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from shapley_games import coalitions, kernel_probabilities
from torch import Tensor

from localign.alignment.masks import MaskSampler, _one_block_mask
from localign.errors import UserError
from localign.options.names import MaskKind

GRID = (8, 10)
KINDS: list[tuple[MaskKind, float]] = [
    ("uniform", 0.5),
    *(("bernoulli", k) for k in (0.25, 0.5, 0.75)),
    *(("block", k) for k in (0.25, 0.5, 0.75)),
    ("shapley", 0.5),
]


def draw(kind: MaskKind, keep: float = 0.5, count: int = 2000, grid: tuple[int, int] = GRID) -> Tensor:
    sampler = MaskSampler(kind, keep, complement=False, all_visible=False)
    return sampler(0, torch.arange(count), grid)[:, 0]


@pytest.mark.parametrize(("kind", "keep"), KINDS)
@pytest.mark.parametrize(("complement", "all_visible"), list(product([True, False], repeat=2)))
def test_masks_per_image(kind: MaskKind, keep: float, complement: bool, all_visible: bool) -> None:
    sampler = MaskSampler(kind, keep, complement, all_visible)
    masks = sampler(3, torch.arange(20), GRID)
    assert masks.dtype == torch.bool
    assert masks.shape == (20, sampler.masks_per_image, 80)
    assert sampler.masks_per_image == 1 + complement + all_visible
    first = masks[:, 0]
    assert torch.equal(first, MaskSampler(kind, keep, False, False)(3, torch.arange(20), GRID)[:, 0])
    assert not first.all(dim=1).all()
    if complement:
        assert torch.equal(masks[:, 1], ~first)
    if all_visible:
        assert masks[:, -1].all()


@pytest.mark.parametrize(("kind", "keep"), KINDS)
def test_a_mask_is_a_function_of_seed_and_position_alone(kind: MaskKind, keep: float) -> None:
    sampler = MaskSampler(kind, keep)
    together = sampler(3, torch.arange(100, 140), GRID)
    apart = torch.cat([sampler(3, torch.tensor([p]), GRID) for p in range(139, 99, -1)]).flip(0)
    assert torch.equal(together, apart)
    assert not torch.equal(together, sampler(4, torch.arange(100, 140), GRID))
    assert not torch.equal(together, sampler(3, torch.arange(200, 240), GRID))
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert torch.equal(together, sampler(3, torch.arange(100, 140), GRID))


def test_uniform_cardinality_is_uniform_from_0_to_n() -> None:
    grid, draws = (3, 3), 20000
    sizes = draw("uniform", count=draws, grid=grid).sum(1)
    counts = torch.bincount(sizes, minlength=10).double()
    assert len(counts) == 10
    chi_square = ((counts - draws / 10) ** 2 / (draws / 10)).sum()
    assert chi_square < 27.9  # 9 degrees of freedom, one in a thousand


def test_uniform_positions_are_uniform_for_every_cardinality() -> None:
    masks = draw("uniform", count=40000, grid=(2, 3))
    codes = (masks * 2 ** torch.arange(6)).sum(1)
    for size in range(7):
        chosen = codes[masks.sum(1) == size]
        counts = torch.bincount(chosen, minlength=64)
        subsets = [c for c in range(64) if c.bit_count() == size]
        expected = len(chosen) / len(subsets)
        assert counts.sum() == counts[subsets].sum()
        chi_square = ((counts[subsets] - expected) ** 2 / expected).sum()
        assert chi_square < len(subsets) - 1 + 5 * (2 * len(subsets)) ** 0.5


def test_shapley_masks_follow_the_kernels_probabilities() -> None:
    draws = 40000
    codes = (draw("shapley", count=draws, grid=(1, 4)) * 2 ** torch.arange(4)).sum(1)
    expected = draws * kernel_probabilities(4)
    counts = torch.bincount(codes, minlength=16)
    assert counts[[0, 15]].sum() == 0
    chi_square = ((counts - expected)[1:15] ** 2 / expected[1:15]).sum()
    assert chi_square < 34.5  # 13 degrees of freedom, one in a thousand
    sizes = coalitions(4).sum(1)
    assert kernel_probabilities(4)[sizes == 1].sum() / kernel_probabilities(4)[
        sizes == 2
    ].sum() == pytest.approx(4 / 3)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_bernoulli_keeps_each_patch_with_the_given_probability(keep: float) -> None:
    masks = draw("bernoulli", keep).double()
    assert masks.mean() == pytest.approx(keep, abs=0.005)
    assert (masks.mean(0) - keep).abs().max() < 0.05
    # independent: the cardinality has the binomial's variance
    assert masks.sum(1).var() == pytest.approx(80 * keep * (1 - keep), rel=0.15)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_blocks_hide_their_share_and_overshoot_by_less_than_a_block(keep: float) -> None:
    grid = (14, 14)
    hidden = (~draw("block", keep, 300, grid)).sum(1)
    target = round((1 - keep) * 196)
    assert hidden.min() >= target
    assert hidden.max() < target + 24
    assert hidden.float().std() > 0


@pytest.mark.parametrize("grid", [(14, 14), (8, 10), (3, 40)])
def test_blocks_are_rectangles_of_at_least_sixteen_patches(grid: tuple[int, int]) -> None:
    class Recorder:
        """Forwards draws and records them: each pair of integers is the position of one accepted block."""

        def __init__(self, seed: int) -> None:
            self.draw = np.random.default_rng(seed)
            self.room: list[int] = []

        def uniform(self, low: float, high: float) -> float:
            return self.draw.uniform(low, high)

        def integers(self, low: int, high: int) -> int:
            self.room.append(high)
            return int(self.draw.integers(low, high))

    for seed in range(50):
        recorder = Recorder(seed)
        keep = _one_block_mask(MaskSampler("block", 0.5), recorder, grid)  # type: ignore[arg-type]
        sides = [(grid[0] + 1 - h, grid[1] + 1 - w) for h, w in zip(*[iter(recorder.room)] * 2, strict=True)]
        assert all(h * w >= 16 for h, w in sides)
        assert all(0.25 <= h / w <= 4 or h == grid[0] or w == grid[1] for h, w in sides)  # 0.3, rounded
        covered = ~keep
        # every hidden patch lies in a hidden rectangle of 16 patches or more: grow from the patch itself
        for row, column in zip(*np.nonzero(covered), strict=True):
            assert any(_inside_hidden(covered, row, column, h, w) for h, w in sides)


def _inside_hidden(covered: np.ndarray, row: int, column: int, height: int, width: int) -> bool:
    tops = range(max(0, row - height + 1), min(row, covered.shape[0] - height) + 1)
    lefts = range(max(0, column - width + 1), min(column, covered.shape[1] - width) + 1)
    return any(covered[t : t + height, s : s + width].all() for t in tops for s in lefts)


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="hides 8"):
        MaskSampler("block", 0.5).check((4, 4))
    with pytest.raises(UserError, match="too narrow"):
        MaskSampler("block", 0.5).check((2, 40))
    with pytest.raises(UserError, match="do not fit"):
        MaskSampler("block", 0.5)(0, torch.arange(1), (1, 64))
    MaskSampler("block", 0.5).check((6, 6))
    MaskSampler("uniform").check((1, 1))
    with pytest.raises(UserError, match="two or more"):
        MaskSampler("shapley").check((1, 1))
    MaskSampler("shapley").check((1, 2))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"kind": "blocks"}, "unknown mask kind"),
        ({"kind": "bernoulli", "keep_ratio": 0.0}, "between 0 and 1"),
        ({"kind": "bernoulli", "keep_ratio": 1.0}, "between 0 and 1"),
        ({"kind": "uniform", "keep_ratio": 0.25}, "own number of visible patches"),
        ({"kind": "shapley", "keep_ratio": 0.25}, "own number of visible patches"),
        ({"kind": "block", "block_min_patches": 0}, "at least one patch"),
    ],
)
def test_contradictory_options_are_refused(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        MaskSampler(**arguments)  # type: ignore[arg-type]
