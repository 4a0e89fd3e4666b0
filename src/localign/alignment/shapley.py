"""Shapley values of small games, by enumeration and as the solution of a weighted least-squares problem.

A game gives a vector ``v(S)`` to every set S of visible patches. Its Shapley values are the patch vectors
``g`` with ``sum_i g_i = v(all) - v(none)`` that minimise the squared error of ``sum_{i in S} g_i`` against
``v(S) - v(none)``, where S has k of n patches with probability proportional to 1 / (k (n - k)), all sets of
one size alike (Charnes et al., 1988). That distribution of masks is the *Shapley kernel*; with it the additive
objective (section 3.1, eq. 2 of the paper) has Shapley values as its solution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_PLAYERS = 10
"""A game of n patches has 2**n values."""


def coalitions(players: int) -> Tensor:
    """Every set of players: bool ``(2**players, players)``; bit i of the row's number says whether i is in.

    Raises:
        ValueError: There are none, or more than :data:`MAX_PLAYERS`.
    """
    if not 1 <= players <= MAX_PLAYERS:
        raise ValueError(f"enumeration is for 1 to {MAX_PLAYERS} players, not {players}")
    numbers = torch.arange(2**players)[:, None]
    return (numbers >> torch.arange(players)) & 1 == 1


def kernel_cardinalities(players: int) -> Tensor:
    """How likely the Shapley kernel draws a set of each size: float64 ``(players + 1,)``.

    Proportional to 1 / (k (n - k)); 0 for the empty and the full set, which the solution meets exactly.
    """
    sizes = torch.arange(1, players, dtype=torch.float64)
    weights = 1 / (sizes * (players - sizes))
    return (
        torch.nn.functional.pad(weights / weights.sum(), (1, 1)) if players > 1 else torch.zeros(2).double()
    )


def kernel_probabilities(players: int) -> Tensor:
    """How likely the Shapley kernel draws each row of :func:`coalitions`: float64 ``(2**players,)``."""
    sizes = coalitions(players).sum(1)
    alike = torch.tensor([math.comb(players, k) for k in range(players + 1)], dtype=torch.float64)
    return (kernel_cardinalities(players) / alike)[sizes]


def shapley_values(game: Tensor) -> Tensor:
    """Shapley values by their definition: a player's mean contribution over all orders of joining.

    Args:
        game: ``(2**n, ...)``, the value of each row of :func:`coalitions`.

    Returns:
        float64 ``(n, ...)``; they sum to the full set's value minus the empty set's.

    Raises:
        ValueError: The number of values is no power of two, or n exceeds :data:`MAX_PLAYERS`.
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
    """Patch vectors that solve the additive objective under the Shapley kernel, in closed form.

    The normal equations of the expected squared error, bordered by the constraint that the vectors sum to the
    full set's value; the game is counted from the empty set's.

    Args:
        game: ``(2**n, ...)``, the value of each row of :func:`coalitions`.

    Returns:
        float64 ``(n, ...)``.

    Raises:
        ValueError: As :func:`shapley_values`.
    """
    players = _players(game)
    sets, weights = coalitions(players).double(), kernel_probabilities(players)
    value = (game.double() - game[0].double()).reshape(len(game), -1)
    bordered = torch.ones(players + 1, players + 1, dtype=torch.float64)
    bordered[:-1, :-1] = sets.T @ (weights[:, None] * sets)
    bordered[-1, -1] = 0
    right = torch.cat([sets.T @ (weights[:, None] * value), value[-1:]])
    return torch.linalg.solve(bordered, right)[:-1].reshape(players, *game.shape[1:])


def _players(game: Tensor) -> int:
    players = len(game).bit_length() - 1
    if len(game) != 2**players:
        raise ValueError(f"a game has a value for each of its 2**n sets, not {len(game)} values")
    return players
