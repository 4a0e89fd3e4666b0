"""Shapley values: their definition, the least-squares problem and the trained objective agree."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from shapley_games import coalitions, kernel_probabilities, kernel_solution, shapley_values
from torch import Tensor

from localign.alignment import AlignConfig
from localign.alignment.objectives import Additive
from localign.alignment.setup import build_objective
from localign.alignment.shapley import kernel_cardinalities
from localign.alignment.teacher import Teacher
from localign.backbones import create_backbone

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def random_game(players: int, *shape: int) -> Tensor:
    return torch.randn(2**players, *shape, generator=torch.Generator().manual_seed(players))


@pytest.mark.parametrize("players", [1, 2, 3, 5])
def test_a_shapley_value_is_the_mean_contribution_over_all_orders(players: int) -> None:
    game = random_game(players, 3).double()
    expected = torch.zeros(players, 3, dtype=torch.float64)
    orders = list(permutations(range(players)))
    for order in orders:
        joined = 0
        for player in order:
            expected[player] += (game[joined | 1 << player] - game[joined]) / len(orders)
            joined |= 1 << player
    torch.testing.assert_close(shapley_values(game), expected)


def test_an_additive_game_gives_back_its_terms() -> None:
    terms = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    game = coalitions(4).double() @ terms + 7
    torch.testing.assert_close(shapley_values(game), terms)
    torch.testing.assert_close(kernel_solution(game), terms)


@pytest.mark.parametrize("players", range(1, 11))
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_the_closed_form_is_the_enumeration(players: int, shape: tuple[int, ...]) -> None:
    game = random_game(players, *shape)
    solved, enumerated = kernel_solution(game), shapley_values(game)
    assert solved.shape == (players, *shape)
    assert (solved - enumerated).abs().max() < 1e-9
    assert torch.allclose(solved.sum(0), (game[-1].double() - game[0].double()))


def test_the_kernel_is_a_distribution_without_the_two_trivial_sets() -> None:
    for players in range(2, 11):
        assert kernel_probabilities(players).sum() == pytest.approx(1)
        assert kernel_probabilities(players)[[0, -1]].tolist() == [0, 0]
    sizes = kernel_cardinalities(196)
    assert sizes.sum() == pytest.approx(1)
    assert float(sizes[1] / sizes[98]) == pytest.approx(98 * 98 / 195)


@pytest.mark.parametrize(("values", "reason"), [(6, "2\\*\\*n"), (2**11, "1 to 10 players"), (1, "not 0")])
def test_games_that_cannot_be_enumerated_are_refused(values: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        shapley_values(torch.zeros(values))


# -- the trained objective -------------------------------------------------------------------------------


def objective_and_game(grid: tuple[int, int], mask: str = "shapley") -> tuple[Additive, Tensor, Tensor]:
    """An objective with a real teacher, one image, and the scaled output for every mask."""
    size = grid[0] * 8, grid[1] * 8
    backbone = create_backbone(
        "vit_tiny_patch16_224", weights="none", image_size=size, model_kwargs=TINY, seed=3
    )
    for (
        block
    ) in backbone.vit.blocks:  # random weights hardly mix patches; larger ones make the game non-additive
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    teacher = Teacher(backbone, "cls")
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    every = coalitions(grid[0] * grid[1])[None]
    teacher.scale.fill_(float(teacher(images, every).std()))
    config = AlignConfig(objective="additive", mask=mask)  # type: ignore[arg-type]
    objective = build_objective(config, teacher)
    assert isinstance(objective, Additive)
    return objective, images, teacher(images, every)


def expected_loss(objective: Additive, images: Tensor, vectors: Tensor) -> Tensor:
    """The expected loss of the objective over the masks of its sampler."""
    masks = coalitions(vectors.shape[1])
    sizes, likely = masks.sum(1), kernel_cardinalities(vectors.shape[1])
    total = vectors.new_zeros(())
    for size in range(1, vectors.shape[1]):
        some = masks[sizes == size]
        views = torch.cat([some, torch.ones_like(some[:1])])[None]  # the all-visible view comes last
        loss, count = objective.loss(vectors, objective.target(images, views), views)
        assert count == len(some)
        total = total + float(likely[size]) * loss / count
    return total


def exact_sum(vectors: Tensor, game: Tensor) -> Tensor:
    """The patch vectors inside the loss: they sum to the output for the whole image."""
    return vectors + (game[-1] - game[0] - vectors.sum(0)) / len(vectors)


@pytest.mark.parametrize("grid", [(2, 2), (3, 3)])
def test_the_expected_gradient_of_the_objective_is_zero_at_the_shapley_values(grid: tuple[int, int]) -> None:
    objective, images, game = objective_and_game(grid)
    values = shapley_values(game).float()
    solution = values[None].requires_grad_()
    (slope,) = torch.autograd.grad(expected_loss(objective, images, solution), solution)
    assert slope.abs().max() < 1e-6
    draw = torch.Generator().manual_seed(0)
    elsewhere = (values + 0.1 * torch.randn(values.shape, generator=draw))[None].requires_grad_()
    (slope,) = torch.autograd.grad(expected_loss(objective, images, elsewhere), elsewhere)
    assert slope.abs().max() > 1e-4


def test_minimising_the_objective_gives_the_shapley_values() -> None:
    objective, images, game = objective_and_game((3, 3))
    vectors = torch.zeros(1, 9, 24, requires_grad=True)
    optimizer = torch.optim.LBFGS([vectors], max_iter=60, line_search_fn="strong_wolfe", tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 100 * expected_loss(objective, images, vectors)
        loss.backward()
        return loss

    optimizer.step(closure)
    values = shapley_values(game).float()
    assert (exact_sum(vectors[0].detach(), game) - values).abs().max() < 1e-4
    plain = torch.linalg.lstsq(coalitions(9).double(), (game - game[0]).double()).solution
    assert (plain - values).abs().max() > 1e-2  # equal weights of all masks give another solution


def test_targets_are_relative_to_the_output_for_the_empty_view() -> None:
    objective, images, game = objective_and_game((2, 2), mask="uniform")
    none = torch.zeros(1, 1, 4, dtype=torch.bool)
    assert objective.target(images, none).abs().max() < 1e-6
    every = coalitions(4)[None]
    torch.testing.assert_close(objective.target(images, every), game - game[0], atol=1e-5, rtol=0)
    assert not objective.exact_sum
    terms = torch.randn(1, 4, 24)
    loss, count = objective.loss(terms, game - game[0], every)
    expected = (coalitions(4).float() @ terms[0] - (game - game[0])).square().mean(1).sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert count == 16
