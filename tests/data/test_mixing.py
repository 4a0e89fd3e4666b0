"""A mixed sample depends on its pair and the seed, not on the batch it comes in."""

from __future__ import annotations

import pytest
import torch

from localign.data.mixing import CutMix, Mixing, Mixup, mix_labels
from localign.errors import UserError


def images(count: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    values = torch.randint(0, 256, (count, 3, 12, 20), generator=torch.Generator().manual_seed(0))
    return values.to(dtype)


ALL = [Mixup(0.5), CutMix(1.0), Mixing(0.5, 1.0)]


@pytest.mark.parametrize("mixing", ALL)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_splitting_the_batch_changes_nothing(mixing: Mixing, dtype: torch.dtype) -> None:
    batch, positions = images(16, dtype), torch.arange(32, 48)
    whole = mixing(batch, positions, 7)
    for size in (2, 4, 8):
        parts = [mixing(batch[i : i + size], positions[i : i + size], 7) for i in range(0, 16, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == dtype
    assert whole.shape == batch.shape
    assert not torch.equal(whole, mixing(batch, positions, 8))
    assert not torch.equal(whole, mixing(batch, positions + 16, 7))
    assert torch.equal(batch, images(16, dtype))  # the input is left alone


def test_mixup_is_a_convex_combination_with_the_neighbour() -> None:
    batch = torch.stack([torch.full((3, 4, 4), float(i % 2)) for i in range(2000)])
    mixed = Mixup(0.5)(batch, torch.arange(2000), 0)
    assert torch.equal(mixed.amin((1, 2, 3)), mixed.amax((1, 2, 3)))  # one weight for the whole image
    weight = mixed[1::2, 0, 0, 0]  # the second's share of itself
    torch.testing.assert_close(mixed[::2, 0, 0, 0], 1 - weight)
    assert abs(weight.mean().item() - 0.5) < 0.04
    assert abs(weight.var().item() - 0.125) < 0.015  # Beta(a, a) has variance 1 / (4 (2a + 1))


def test_cutmix_swaps_one_box_of_the_drawn_area() -> None:
    batch = torch.stack([torch.full((1, 40, 40), float(i % 2)) for i in range(2000)])
    mixed = CutMix(1.0)(batch, torch.arange(2000), 0)
    assert set(torch.unique(mixed).tolist()) == {0.0, 1.0}
    swapped = mixed[::2, 0] == 1
    assert torch.equal(swapped, mixed[1::2, 0] == 0)
    for box in swapped[:50]:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns[None, :])
        for line in (rows, columns):
            assert (line.int().diff().abs().sum() <= 2).item()
    # E[1 - lam] = 1/2; clipping at the border keeps, per axis, 1 - s/4 of a side s in the mean:
    # E[s^2 (1 - s/4)^2] with s = sqrt(1 - lam), 1 - lam uniform: 1/2 - (1/2)(2/5) + (1/16)(1/3) = 0.3208
    assert abs(swapped.float().mean().item() - 0.3208) < 0.03


def test_both_take_turns() -> None:
    batch = torch.stack([torch.full((1, 8, 8), float(i % 2)) for i in range(2000)])
    mixed = Mixing(0.5, 1.0)(batch, torch.arange(2000), 0)[::2]
    blended = ((mixed > 0) & (mixed < 1)).flatten(1).any(1)
    assert 0.42 < blended.float().mean().item() < 0.55


def test_what_cannot_be_paired_is_refused() -> None:
    for positions in (torch.arange(3), torch.arange(1, 5), torch.tensor([0, 1, 2, 4])):
        with pytest.raises(UserError, match=r"split a pair$"):
            Mixup(0.5)(images(len(positions)), positions, 0)
    with pytest.raises(UserError, match="needs an alpha"):
        Mixing()
    with pytest.raises(UserError, match="positive"):
        CutMix(0.0)


@pytest.mark.parametrize("mixing", ALL)
def test_labels_are_mixed_in_the_shares_of_the_images(mixing: Mixing) -> None:
    """Where an image is its label in every pixel, the mixed image's mean is the mixed label."""
    labels = torch.arange(64).float()
    batch = labels[:, None, None, None].expand(-1, 1, 20, 20).clone()
    positions = torch.arange(64)
    mixed, share = mixing.mix(batch, positions, 3)
    assert torch.equal(mixed, mixing(batch, positions, 3))
    assert torch.equal(share[::2], share[1::2])
    assert bool(((share > 0) & (share < 1)).any())
    targets = torch.stack([labels, 1 - labels], 1)
    means = mixed.mean((1, 2, 3))
    torch.testing.assert_close(mix_labels(targets, share), torch.stack([means, 1 - means], 1))
    assert torch.equal(mix_labels(targets, torch.ones(64)), targets)
