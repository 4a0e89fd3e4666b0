"""Losses count the selected tokens only, and divide by their number."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from localign.alignment.losses import LOSSES, reconstruction_loss, select_tokens
from localign.options.names import LossName, TokenSelection

NAMES: list[LossName] = ["mse", "cosine", "l1"]


def pair(views: int = 4, tokens: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, views, tokens, 6)
    first, second = torch.randn(shape, generator=generator)
    return first, second


def test_the_table_is_complete() -> None:
    assert set(LOSSES) == set(get_args(LossName)) == set(NAMES)
    assert get_args(TokenSelection) == ("all", "hidden", "visible")


def test_values_by_hand() -> None:
    prediction = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
    target = torch.tensor([[[0.0, 0.0], [6.0, 8.0]]])
    for name, total in (("mse", 0.5 + 12.5), ("l1", 0.5 + 3.5)):
        value, count = reconstruction_loss(prediction, target, name)  # type: ignore[arg-type]
        assert value.item() == pytest.approx(total)
        assert count.item() == 2
    value, count = reconstruction_loss(prediction[:, 1:], target[:, 1:], "cosine")
    assert value.item() == pytest.approx(0, abs=1e-6)
    value, count = reconstruction_loss(prediction[:, 1:], -target[:, 1:], "cosine")
    assert value.item() == pytest.approx(2)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_all_tokens_equals_torchs(name: LossName) -> None:
    prediction, target = pair()
    total, count = reconstruction_loss(prediction, target, name)
    reference = {
        "mse": torch.nn.functional.mse_loss(prediction, target),
        "l1": torch.nn.functional.l1_loss(prediction, target),
        "cosine": 1 - torch.cosine_similarity(prediction, target, dim=-1).mean(),
    }[name]
    assert torch.allclose(total / count, reference)
    pooled_total, pooled_count = reconstruction_loss(prediction[:, 0], target[:, 0], name)
    assert pooled_count == 4
    assert pooled_total.ndim == 0


def test_hidden_includes_prefix_tokens_and_visible_does_not() -> None:
    keep = torch.tensor([[True, False, True], [True, True, True]])
    assert select_tokens(keep, 2, "all") is None
    hidden = select_tokens(keep, 2, "hidden")
    visible = select_tokens(keep, 2, "visible")
    assert hidden is not None
    assert visible is not None
    assert hidden.tolist() == [[True, True, False, True, False], [True, True, False, False, False]]
    assert torch.equal(visible, ~hidden)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("selection", ["hidden", "visible"])
def test_a_mean_divides_by_the_number_of_selected_tokens(name: LossName, selection: str) -> None:
    prediction, target = pair()
    keep = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1]]).bool()
    selected = select_tokens(keep, 1, selection)  # type: ignore[arg-type]
    assert selected is not None
    total, count = reconstruction_loss(prediction, target, name, selected)
    assert count.item() == selected.sum().item() == (11 if selection == "hidden" else 9)
    assert torch.allclose(total / count, LOSSES[name](prediction[selected], target[selected]).mean())
    other = torch.where(selected[..., None], prediction, 1e3 * torch.ones(()))
    assert torch.equal(reconstruction_loss(other, target, name, selected)[0], total)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_of_any_size_give_one_mean(name: LossName) -> None:
    prediction, target = pair(views=12)
    keep = torch.rand(12, 4, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, 12)[:, None]
    selected = select_tokens(keep, 1, "hidden")
    assert selected is not None
    expected = reconstruction_loss(prediction, target, name, selected)
    for size in (1, 5, 6):
        chunks = zip(prediction.split(size), target.split(size), selected.split(size), strict=True)
        parts = [torch.stack(reconstruction_loss(p, t, name, s)) for p, t, s in chunks]
        total, count = torch.stack(parts).sum(0)
        assert torch.allclose(total / count, expected[0] / expected[1])


def test_without_selected_tokens_sum_and_count_are_zero() -> None:
    prediction, target = pair()
    nothing = torch.zeros(4, 5, dtype=torch.bool)
    assert [x.item() for x in reconstruction_loss(prediction, target, "mse", nothing)] == [0, 0]


def test_losses_are_computed_in_float32() -> None:
    prediction, target = (x.bfloat16() for x in pair())
    total, count = reconstruction_loss(prediction, target, "mse")
    assert total.dtype == count.dtype == torch.float32
    assert torch.equal(total, reconstruction_loss(prediction.float(), target.float(), "mse")[0])
