"""What a step came to: read from the device one step late, so that the device never waits for the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localign.engine.distributed import DistributedContext
from localign.engine.log import say
from localign.engine.metrics import Totals
from localign.engine.nonfinite import NonFiniteGuard
from localign.engine.optim.build import Average

LATE_DEVICES = frozenset({"cuda"})
"""Types of devices that compute while the host goes on, so that reading a value at once would cost time."""


def runs_ahead(device: torch.device) -> bool:
    """Whether the host goes on while the device computes, until it reads a value."""
    return device.type in LATE_DEVICES


def reads_late(device: torch.device, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the loop reads a step's verdict one step late.

    The optimizer must then leave out a step by itself: torch's fused optimizers do, for which
    ``optimizer.found_inf`` is a tensor on the device.
    """
    return runs_ahead(device) and all(group.get("fused") for group in optimizer.param_groups)


class Reading:
    """Values of a small tensor, which start their way to the host now and are waited for when asked for.

    Args:
        values: float32 ``(n,)``.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values.to("cpu", copy=True, non_blocking=runs_ahead(values.device))

    def values(self) -> list[float]:
        """The values; waits only for the work that was queued before the reading began."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values


@dataclass
class Verdict:
    """A step whose gradients are computed."""

    step: int
    """Counted from 1."""
    batches: list[Any]
    metrics: list[dict[str, tuple[Tensor, Tensor]]]
    sums: Tensor
    """Loss and weight over all ranks, ``(2,)``."""
    grad_norm: Tensor
    reading: Reading
    """Mean loss, gradient norm, and the number of ranks that a signal asked to stop. All ranks read the same."""


class Verdicts:
    """Takes steps whose loss and gradients are finite, and leaves out and reports the others.

    On GPUs the optimizer itself leaves out a step, and the host learns of it while the next one is computed. Either way
    a non-finite step never enters the weights or their average, and messages name the step that they are about.

    Args:
        module: What is trained.
        optimizer: Over the module's parameters.
        ema: The module's moving average.
        totals: Sums for the log.
        guard: Counts the steps that are left out.
        context: This rank.
        writing: Makes the context in which files are written.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: Average | None,
        totals: Totals,
        guard: NonFiniteGuard,
        context: DistributedContext,
        writing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.module, self.optimizer, self.ema = module, optimizer, ema
        self.totals, self.guard, self.context, self.writing = totals, guard, context, writing
        self.late = reads_late(context.device, optimizer)
        self.stops = False
        """Whether a signal asked a rank to stop, in a step whose verdict has been read."""
        self._pending: Verdict | None = None

    def take(self, verdict: Verdict) -> None:
        """Take an optimizer step if its loss and gradient norm are finite.

        Raises:
            RunFailure: Too many steps in a row were not finite.
        """
        if self.late:
            self.settle()  # before the weights change: their average takes those after the step before
            finite = torch.isfinite(verdict.sums[0] / verdict.sums[1].clamp(min=1)) & torch.isfinite(
                verdict.grad_norm
            )
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            self._pending = verdict
            return
        loss, grad_norm, _ = verdict.reading.values()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step()
        self._conclude(verdict)

    def settle(self) -> None:
        """Read the verdict that has not been read yet, if there is one. Call it before logging, validating or saving.

        Raises:
            RunFailure: Too many steps in a row were not finite.
        """
        if self._pending is not None:
            verdict, self._pending = self._pending, None
            self._conclude(verdict)

    def _conclude(self, verdict: Verdict) -> None:
        """Count a step that is in the weights, or report one that is not."""
        loss, grad_norm, stops = verdict.reading.values()
        self.stops |= stops > 0
        if math.isfinite(loss) and math.isfinite(grad_norm):
            if self.ema is not None:
                self.ema.update_parameters(self.module)
            self.guard.passed()
            self.totals.add_step(verdict.sums, verdict.grad_norm)
            for values in verdict.metrics:
                self.totals.add(values)
            return
        self.totals.steps_seen += 1
        if self.context.is_main:
            say(f"step {verdict.step}: loss {loss}, gradient norm {grad_norm}; skipped")
        with self.writing():
            self.guard.skip(verdict.step, verdict.batches, loss, grad_norm)
