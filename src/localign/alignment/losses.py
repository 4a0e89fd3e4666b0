"""Reconstruction losses as pure functions, shared by training and validation.

A loss is returned as a *sum over tokens* and the *number of tokens*, so that the mean over any number of micro-batches
and ranks divides by the number of selected tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from localign.options.names import LossName, TokenSelection


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error, averaged over channels: two ``(..., width)`` to ``(...)``. Equation 1 of the paper."""
    return F.mse_loss(prediction, target, reduction="none").mean(dim=-1)


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine similarity: two ``(..., width)`` to ``(...)`` in 0..2."""
    return 1 - F.cosine_similarity(prediction, target, dim=-1)


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute error, averaged over channels: two ``(..., width)`` to ``(...)``."""
    return (prediction - target).abs().mean(dim=-1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "cosine": cosine, "l1": l1}


def select_tokens(keep_mask: Tensor, num_prefix_tokens: int, selection: TokenSelection) -> Tensor | None:
    """Select the tokens that count in a loss.

    Prefix tokens are hidden at the decoder's input in every view, so ``hidden`` includes them.

    Args:
        keep_mask: bool ``(views, patches)``, True = visible.
        num_prefix_tokens: Number of tokens before the patches.
        selection: ``all``, ``hidden`` or ``visible``.

    Returns:
        bool ``(views, num_prefix_tokens + patches)``, or None for all.
    """
    if selection == "all":
        return None
    chosen = keep_mask if selection == "visible" else ~keep_mask
    return F.pad(chosen, (num_prefix_tokens, 0), value=selection == "hidden")


def reconstruction_loss(
    prediction: Tensor, target: Tensor, name: LossName, selected: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss summed over tokens in float32, and the number of tokens.

    Args:
        prediction: ``(views, tokens, width)``, or ``(views, width)``.
        target: Same shape as ``prediction``.
        name: A key of :data:`LOSSES`.
        selected: bool ``(views, tokens)``, or ``(views,)``; None selects all.

    Returns:
        Two float32 scalars, sum and count; the count may be 0.
    """
    per_token = LOSSES[name](prediction.float(), target.float())
    if selected is None:
        return per_token.sum(), per_token.new_full((), per_token.numel())
    weight = selected.to(per_token.dtype)
    return (per_token * weight).sum(), weight.sum()
