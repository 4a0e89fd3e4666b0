"""Learning rates of heads, and the rule that says whether a head has converged.

A head has converged if its loss on held-out images has stopped falling. The loss decides and not the recall: on few
images recall is noisy, and it keeps creeping over its threshold of 0.5 while a head only grows more confident.

A training of a fixed length has the published benchmark's schedule: its cosine spans the warm-up too, and the warm-up
starts above 0. A training until convergence does not know its length. There, each head's learning rate is constant
after the warm-up until the head has converged, and then falls along a cosine over a further quarter of its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from localign.engine.optim.build import cosine_decay
from localign.options.probe import ProbeConfig

WINDOW = 0.25
"""The last part of a training in which a converged head's loss no longer falls."""
MIN_FALL = 0.02
"""A fall of the loss in the window by less than this share of the loss is none."""
MIN_SHARE_OF_FALL = 0.001
"""Nor is a fall by less than this share of the whole fall, as of a loss that approaches 0."""
LEAST_STEPS = 200
"""No head is stopped before this step."""

LossPoint = tuple[int, float]
"""A step, and a head's loss on held-out images after it."""


def learning_rate(step: int, steps: int, warmup_steps: int, lr: float, final_lr: float) -> float:
    """The learning rate of a step, 0-based: linear up to ``lr`` during warm-up, then a cosine over all steps."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return final_lr + (lr - final_lr) * cosine_decay(step / steps)


def check_steps(steps: int) -> list[int]:
    """The steps at which the held-out loss is measured: 0, every 25 to step 500, then 5 % apart, and the last."""
    checks = [0]
    while checks[-1] < steps:
        checks.append(min(steps, checks[-1] + max(25, checks[-1] // 20)))
    return checks


def has_converged(curve: Sequence[LossPoint]) -> bool:
    """Whether a head's held-out loss has stopped falling.

    It has if the lowest loss fell in the last quarter of the steps by less than 2 %, or by less than 0.1 % of its whole
    fall since the head was initialised. It has not if the last quarter brought 2 % of the whole fall, as with a
    learning rate too low to get anywhere.

    Args:
        curve: Points from step 0 on, the last one at the end of the training.
    """
    end, best = curve[-1][0], min(loss for _, loss in curve)
    before = min(loss for step, loss in curve if step <= (1 - WINDOW) * end)
    last, whole = before - best, curve[0][1] - best
    return last < max(MIN_FALL * best, MIN_SHARE_OF_FALL * whole) and last < MIN_FALL * whole


@dataclass
class HeadSchedule:
    """One head's held-out losses, and in a training until convergence its learning rate and its last step."""

    config: ProbeConfig
    checks: Sequence[int]
    """See :func:`check_steps`."""
    warmup_steps: int
    curve: list[LossPoint] = field(default_factory=list)
    converged_at: int | None = None
    """The step at which the loss had stopped falling."""

    @property
    def end(self) -> int:
        """The head's last step, as far as it is known."""
        if self.converged_at is None:
            return self.checks[-1]
        wanted = self.converged_at / (1 - WINDOW)
        return next((step for step in self.checks if step >= wanted), self.checks[-1])

    @property
    def best_step(self) -> int:
        """The step with the lowest loss."""
        return min(self.curve, key=lambda point: point[1])[0]

    def add(self, step: int, loss: float) -> bool:
        """Add a point. Returns whether the loss is the lowest so far."""
        self.curve.append((step, loss))
        least = max(LEAST_STEPS, 4 * self.warmup_steps)
        if self.converged_at is None and step >= least and has_converged(self.curve):
            self.converged_at = step
        return self.best_step == step

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, 0-based, of a training until convergence."""
        lr, final_lr, start = self.config.lr, self.config.final_lr, self.converged_at
        if step < self.warmup_steps:
            return lr * (step + 1) / self.warmup_steps
        if start is None or step < start:
            return lr
        return final_lr + (lr - final_lr) * cosine_decay((step - start) / max(1, self.end - start))
