"""Sums behind the means in a log line."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from localign.engine.distributed import DistributedContext


class Totals:
    """Sums since the last log line. They stay on the device, so that a step does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.steps_seen = 0
        self._loss = torch.zeros(2, device=self.device)
        self._grad_norm = torch.zeros((), device=self.device)
        self._grad_steps = 0
        self._metrics: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()

    def count(self, counts: dict[str, int]) -> None:
        """Add the contents of a micro-batch of this rank, also if its step is skipped later."""
        self._counts.update(counts)

    def rates(self, context: DistributedContext, seconds: float) -> dict[str, float]:
        """The counts of all ranks per second, as ``<name>_per_second``."""
        total: Counter[str] = sum(context.all_gather_object(self._counts), Counter())
        return {f"{name}_per_second": count / seconds for name, count in sorted(total.items())}

    def add(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add this rank's metrics: name -> (sum, count)."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.float(), count.float()]).to(self.device)
            self._metrics[name] = self._metrics.get(name, torch.zeros_like(pair)) + pair

    def add_step(self, sums: Tensor, grad_norm: Tensor) -> None:
        """Add a step that was not skipped, with its loss (sum, weight) over all ranks."""
        self.steps_seen += 1
        self._grad_steps += 1
        self._loss += sums
        self._grad_norm += grad_norm

    def means(self, context: DistributedContext) -> dict[str, Any]:
        """Means over steps, ranks and micro-batches; None for a metric without any count."""
        steps = max(1, self._grad_steps)
        means = torch.stack([self._loss[0] / self._loss[1].clamp(min=1), self._grad_norm / steps])
        pairs = [context.all_reduce(pair) for _, pair in sorted(self._metrics.items())]
        loss, grad_norm, *sums = torch.cat([means, *pairs]).tolist()  # the only wait for the device
        values: dict[str, Any] = {"loss": loss, "grad_norm": grad_norm} if self._grad_steps else {}
        for name, total, count in zip(sorted(self._metrics), sums[::2], sums[1::2], strict=True):
            values[name] = total / count if count else None
        return values
