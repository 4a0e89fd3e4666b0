"""Muon (Jordan et al., 2024): steps matrices along their orthogonalised momentum. With AdamW for other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

_MAX_BATCH = 1 << 24
"""Largest number of entries in matrices that are orthogonalised as one batch."""
_ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates, to which Muon's updates are scaled (Liu et al., 2025)."""


class Muon(torch.optim.Muon):
    """torch's Muon, but orthogonalises matrices of the same shape as one batch, and in float32 unless on a GPU.

    torch's own takes one matrix at a time, in bfloat16. A CPU without bfloat16 instructions emulates them, thirty times
    as slow as float32. Updates are as large as AdamW's, so both optimizers use one learning rate and weight decay.

    Args:
        groups: Parameter groups, of matrices only, each with a ``weight_decay``.
        lr: Learning rate of groups without one.
    """

    def __init__(self, groups: Iterable[dict[str, object]], lr: float) -> None:
        super().__init__(groups, lr=lr)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step. The closure is not called."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
            for matrices in _batches(trained):
                updates = orthogonalise(torch.stack([self._momentum(p, group["momentum"]) for p in matrices]))
                size = group["lr"] * _ADAMW_RMS * max(matrices[0].shape) ** 0.5
                torch._foreach_add_([*matrices], updates.to(matrices[0].dtype).unbind(), alpha=-size)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov momentum: the gradient, moved towards the running mean of gradients."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum_buffer"], momentum)


def _batches(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Batches of matrices of the same shape and dtype."""
    by_shape: dict[tuple[torch.Size, torch.dtype], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
    for same in by_shape.values():
        count = max(1, _MAX_BATCH // max(1, same[0].numel()))
        for begin in range(0, len(same), count):
            yield same[begin : begin + count]


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values near 1 (0.7 to 1.2).

    Five Newton-Schulz steps of a quintic polynomial whose coefficients increase small singular values fast.

    Args:
        matrices: ``(..., rows, columns)``.

    Returns:
        The same shape; bfloat16 on CUDA, else float32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # then no singular value is above 1
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer.

    Args:
        muon, adamw: Have no parameter in common.
    """

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.parts = (muon, adamw)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__([{**group} for group in groups], {})
        self.param_groups = groups  # the same objects as in the parts, so that both see a new learning rate
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step of both optimizers. The closure is not called."""
        for part in self.parts:
            part.step()
