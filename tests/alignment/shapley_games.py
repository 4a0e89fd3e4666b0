"""Shapley values of small games, by their definition and as the solution of a weighted least-squares problem.

A game gives a vector ``v(S)`` to every set S of players (here: visible patches).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from localign.alignment.shapley import kernel_cardinalities

MAX_PLAYERS = 10
"""A game of n players has 2**n values."""


def coalitions(players: int) -> Tensor:
    """Every set of players: bool ``(2**players, players)``; player i belongs to row r if bit i of r is set.

    Raises:
        ValueError: There are no players, or more than :data:`MAX_PLAYERS`.
    """
    if not 1 <= players <= MAX_PLAYERS:
        raise ValueError(f"enumeration is for 1 to {MAX_PLAYERS} players, not {players}")
    numbers = torch.arange(2**players)[:, None]
    return (numbers >> torch.arange(players)) & 1 == 1


def kernel_probabilities(players: int) -> Tensor:
    """Probability of each row of :func:`coalitions` under the Shapley kernel: float64 ``(2**players,)``."""
    sizes = coalitions(players).sum(1)
    sets_of_size = torch.tensor([math.comb(players, k) for k in range(players + 1)], dtype=torch.float64)
    return (kernel_cardinalities(players) / sets_of_size)[sizes]


def shapley_values(game: Tensor) -> Tensor:
    """Shapley values by their definition: a player's mean contribution over all orders of joining.

    Args:
        game: ``(2**n, ...)``, the value of each row of :func:`coalitions`.

    Returns:
        float64 ``(n, ...)``; they sum to the full set's value minus the empty set's.

    Raises:
        ValueError: The number of values is not a power of two, or n exceeds :data:`MAX_PLAYERS`.
    """
    players, value = _players(game), game.double()
    sets = coalitions(players)
    orders = math.factorial(players)
    share = torch.tensor(
        [math.factorial(k) * math.factorial(players - k - 1) / orders for k in range(players)],
        dtype=torch.float64,
    )
    values = []
    for player in range(players):
        without = torch.nonzero(~sets[:, player])[:, 0]
        gained = value[without + 2**player] - value[without]
        values.append(torch.tensordot(share[sets[without].sum(1)], gained, dims=1))
    return torch.stack(values)


def kernel_solution(game: Tensor) -> Tensor:
    """Patch vectors that minimise the additive objective under the Shapley kernel, in closed form.

    It solves the normal equations of the expected squared error, bordered by the constraint that the vectors sum to
    the full set's value. Values are relative to the empty set's value.

    Args:
        game: ``(2**n, ...)``, the value of each row of :func:`coalitions`.

    Returns:
        float64 ``(n, ...)``.

    Raises:
        ValueError: See :func:`shapley_values`.
    """
    players = _players(game)
    sets, weights = coalitions(players).double(), kernel_probabilities(players)
    value = (game.double() - game[0].double()).reshape(len(game), -1)
    bordered = torch.ones(players + 1, players + 1, dtype=torch.float64)
    bordered[:-1, :-1] = sets.T @ (weights[:, None] * sets)
    bordered[-1, -1] = 0
    right = torch.cat([sets.T @ (weights[:, None] * value), value[-1:]])
    solution: Tensor = torch.linalg.solve(bordered, right)
    return solution[:-1].reshape(players, *game.shape[1:])


def _players(game: Tensor) -> int:
    players = len(game).bit_length() - 1
    if len(game) != 2**players:
        raise ValueError(f"a game has a value for each of its 2**n sets, not {len(game)} values")
    return players
