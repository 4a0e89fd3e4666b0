"""The length of a run and the parts of its batch: steps, warm-up, micro-batches, precision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol, TypeVar

from localign.errors import UserError
from localign.options.names import Precision
from localign.options.train import TrainConfig

Config = TypeVar("Config", bound=TrainConfig)


def with_warmup_steps(config: Config, samples: int) -> Config:
    """The config with ``warmup_steps`` in place of the other two warm-up options.

    Args:
        config: Has a batch size.
        samples: Training images.
    """
    if config.warmup_epochs is not None:
        steps = round(config.warmup_epochs * samples / config.batch_size)
        return replace(config, warmup_steps=steps, warmup_epochs=None)
    if config.warmup_ratio is not None:
        # 0.29 * 100 is a hair below 29 in floating point
        steps = math.floor(round(config.warmup_ratio * total_steps(config, samples), 6))
        return replace(config, warmup_steps=steps, warmup_ratio=None)
    return config


def total_steps(config: TrainConfig, samples: int) -> int:
    """Optimizer steps of a run.

    Args:
        config: Has steps or epochs; with neither, the run has one epoch.
        samples: Training images.

    Raises:
        UserError: The warm-up is as long as the run, or longer.
    """
    steps = config.steps
    if steps is None:
        steps = max(1, round((config.epochs or 1.0) * samples / config.batch_size))
    if config.warmup_steps >= steps:
        raise UserError(f"--warmup-steps {config.warmup_steps} must be below the run's {steps} steps")
    return steps


class HasPrecision(Protocol):
    """A config with an option ``precision``."""

    @property
    def precision(self) -> Precision: ...


def computes_in_bf16(config: HasPrecision, device: str) -> bool:
    """Whether a run computes in bfloat16 on a type of device (``cpu``, ``cuda``, ...)."""
    return config.precision == "bf16" or (config.precision == "auto" and device == "cuda")


def batch_shares(config: TrainConfig, ranks: int) -> tuple[int, int]:
    """Images per rank and step, and per forward pass.

    With ``micro_batch`` "auto", the second number is the first until the size is found.

    Raises:
        UserError: The batch size is not divisible.
    """
    per_rank, rest = divmod(config.batch_size, ranks)
    micro = config.micro_batch if isinstance(config.micro_batch, int) else per_rank
    if rest or not per_rank or per_rank % micro:
        raise UserError(
            f"batch size {config.batch_size} does not divide into {ranks} ranks times micro-batches of {micro}"
        )
    return per_rank, micro
