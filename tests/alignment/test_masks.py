"""Masks of each sampler, for every combination of its options."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from shapley_games import coalitions, kernel_probabilities
from torch import Tensor

from localign.alignment.masks import MaskSampler, _block_sides
from localign.errors import UserError
from localign.options.names import MaskKind

GRID = (8, 10)
SAMPLERS = Path(__file__).parents[3] / "shared" / "golden" / "samplers.json"
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


@pytest.mark.parametrize("keep", [0.25, 0.4, 0.5, 0.75])
def test_blocks_show_at_least_their_share(keep: float) -> None:
    grid = (14, 14)
    visible = draw("block", keep, 300, grid).sum(1)
    assert visible.min() >= keep * 196
    assert visible.max() < 196 or keep > 0.5
    assert visible.float().std() > 0
    share = MaskSampler("block", keep).visible_share(grid, 300)
    assert share == pytest.approx(float(visible.float().mean()) / 196)  # of the drawn masks alone


def test_the_realised_share_of_a_coarse_grid() -> None:
    """A block of 16 patches is nearly half of a 6 x 6 grid, and often a second block is needed."""
    assert 0.45 < MaskSampler("block", 0.4).visible_share((6, 6)) < 0.56


def test_blocks_uncover_the_middle_more_often_than_the_border() -> None:
    rate = draw("block", 0.4, 500, (14, 14)).float().mean(0).view(14, 14)
    assert rate[6:8, 6:8].min() > 0.7
    assert max(rate[0].max(), rate[-1].max(), rate[:, 0].max(), rate[:, -1].max()) < 0.4


@pytest.mark.skipif(
    not SAMPLERS.is_file(), reason=f"the rates of the published sampler are not at {SAMPLERS}"
)
@pytest.mark.parametrize("keep", [0.25, 0.4, 0.5])
def test_blocks_are_visible_as_often_as_in_the_published_runs(keep: float) -> None:
    """Rates by ring (distance from the border), their mean, and quantiles of the number of visible patches."""
    published = json.loads(SAMPLERS.read_text())[f"block ratio {keep}"]
    masks = draw("block", keep, published["masks"], (14, 14))
    sides = np.minimum(np.arange(14), np.arange(14)[::-1])
    ring = torch.from_numpy(np.minimum(sides[:, None], sides)).flatten()
    for number, rate in enumerate(published["visible_rate_by_row_and_column_ring"]):
        # Each of the two sets of 4,000 masks has an error of about 0.01.
        assert float(masks[:, ring == number].float().mean()) == pytest.approx(rate, abs=0.025), number
    assert float(masks.float().mean()) == pytest.approx(published["visible_share_mean"], abs=0.006)
    quantiles = np.quantile(masks.sum(1), [0.05, 0.25, 0.5, 0.75, 0.95])
    assert np.abs(quantiles - published["visible_count_quantiles_0_5_25_50_75_95_100"][1:-1]).max() <= 2


@pytest.mark.parametrize("grid", [(14, 14), (8, 10), (3, 40), (1, 64)])
def test_blocks_are_rectangles_of_about_the_drawn_area(grid: tuple[int, int]) -> None:
    sampler = MaskSampler("block", 0.5)
    largest = grid[0] * grid[1] // 2
    for seed in range(200):
        height, width = _block_sides(sampler, np.random.default_rng(seed), grid)
        area = int(np.random.default_rng(seed).integers(16, largest + 1))
        assert height * width <= area + height  # rounding the sides never adds more than a row
        assert 1 <= height <= grid[0]
        assert 1 <= width <= grid[1]
        if height < grid[0] and width < grid[1]:
            assert area - height < height * width
            assert 0.2 < height / width < 6  # 0.3..1/0.3, rounded


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="uncover a whole 4x4 grid"):
        MaskSampler("block", 0.5).check((4, 4))
    with pytest.raises(UserError, match="set a smaller --block-min-patches"):
        MaskSampler("block", 0.5)(0, torch.arange(1), (1, 16))
    assert MaskSampler("block", 1 - 1e-9, block_min_patches=1)(0, torch.arange(9), (20, 20)).any(1).all()
    MaskSampler("block", 0.5).check((2, 40))
    MaskSampler("block", 0.5).check((1, 64))
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
