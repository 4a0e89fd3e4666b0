"""Muon (Jordan et al., 2024): momentum, orthogonalised, as the step of a matrix; and AdamW beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

_AT_ONCE = 1 << 24
"""Entries of the matrices that are orthogonalised together: many small ones in one go, large ones one by one."""
_LIKE_ADAMW = 0.2
"""Root mean square of AdamW's updates, which Muon's are scaled to (Liu et al., 2025)."""


class Muon(torch.optim.Muon):
    """torch's Muon, with matrices of one shape orthogonalised together, and in float32 where that is not a GPU.

    torch takes them one by one, in bfloat16, which CPUs without instructions for it emulate: thirty times as slow as
    float32. An update is as large as one of AdamW, so that one learning rate and one weight decay suit both.

    Args:
        groups: Of parameters, all of them matrices, each group with its ``weight_decay``.
        lr: The groups' learning rate, where they have none.
    """

    def __init__(self, groups: Iterable[dict[str, object]], lr: float) -> None:
        super().__init__(groups, lr=lr)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; there is no closure."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
            for matrices in _alike(trained):
                updates = orthogonalised(
                    torch.stack([self._momentum(p, group["momentum"]) for p in matrices])
                )
                size = group["lr"] * _LIKE_ADAMW * max(matrices[0].shape) ** 0.5
                torch._foreach_add_([*matrices], updates.to(matrices[0].dtype).unbind(), alpha=-size)

    def _momentum(self, parameter: nn.Parameter, keep: float) -> Tensor:
        """Nesterov's: the gradient, drawn towards the mean of those so far."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - keep)
        return parameter.grad.lerp(state["momentum_buffer"], keep)


def _alike(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Matrices of one shape, as many as are orthogonalised together."""
    by_shape: dict[tuple[torch.Size, torch.dtype], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
    for same in by_shape.values():
        together = max(1, _AT_ONCE // max(1, same[0].numel()))
        for begin in range(0, len(same), together):
            yield same[begin : begin + together]


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors, and all singular values near 1 (0.7 to 1.2).

    Five Newton-Schulz steps with a quintic polynomial whose coefficients favour small singular values.

    Args:
        matrices: ``(..., rows, columns)``.

    Returns:
        The same shape; bfloat16 on CUDA, float32 else.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the rest, as one optimizer.

    Args:
        muon, adamw: Over parameters of their own.
    """

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.parts = (muon, adamw)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__([{**group} for group in groups], {})
        self.param_groups = groups  # the parts' own, so that a rate set here is theirs
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Both parts' step; there is no closure."""
        for part in self.parts:
            part.step()
