"""The interface between a training method and the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localign.engine.distributed import TIMEOUT, DistributedContext
from localign.errors import UserError
from localign.options.train import TrainConfig


@dataclass(frozen=True)
class BatchPlan:
    """Which samples of the stream this rank gets."""

    seed: int
    global_batch: int
    """Samples per step over all ranks."""
    micro_batch: int
    """Samples per forward pass of this rank."""
    rank: int
    world_size: int
    workers: int
    start_step: int
    end_step: int
    pin_memory: bool
    timeout: float = TIMEOUT
    """Seconds without a batch from the loader workers after which the run fails."""

    def micro_batches(self) -> Iterator[range]:
        """The positions in the stream of each of this rank's micro-batches, in order."""
        per_rank = self.global_batch // self.world_size
        for step in range(self.start_step, self.end_step):
            first = step * self.global_batch + self.rank * per_rank
            for begin in range(first, first + per_rank, self.micro_batch):
                yield range(begin, begin + self.micro_batch)


def batch_plan(
    config: TrainConfig, context: DistributedContext, micro_batch: int, start: int, end: int
) -> BatchPlan:
    """The batch plan of a rank.

    Args:
        config: The run's config.
        context: The rank.
        micro_batch: Samples per forward pass.
        start, end: The first step, and one past the last.
    """
    return BatchPlan(
        seed=config.seed,
        global_batch=config.batch_size,
        micro_batch=micro_batch,
        rank=context.rank,
        world_size=context.size,
        workers=config.workers,
        start_step=start,
        end_step=end,
        pin_memory=context.device.type == "cuda",
        timeout=config.timeout,
    )


@dataclass
class StepResult:
    """A loss as a sum and a weight, so that its mean does not depend on the number of ranks and micro-batches."""

    loss_sum: Tensor
    """Scalar with gradient: the sum of the loss over its terms (tokens, samples, ...)."""
    weight: Tensor
    """Scalar: the number of terms."""
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Other values to log: name -> (sum, count), scalars without gradient."""


class Task(ABC):
    """A training method: what is trained, and how a batch becomes a loss. The loop owns everything else.

    A subclass must define :attr:`module`, :meth:`samples`, :meth:`fingerprint`, :meth:`batches` and :meth:`step`. All
    other methods have defaults. A complete task, which fits a line::

        class Points(NamedTuple):
            x: Tensor
            positions: Tensor
            indices: Tensor
            bad: tuple[tuple[str, str], ...] = ()

        class LineTask(Task):
            def __init__(self, seed: int) -> None:
                self.seed, self.device = seed, torch.device("cpu")
                with rng.seeded_globals(seed, "line"):
                    self.line = nn.Linear(1, 1)

            @property
            def module(self) -> nn.Module:
                return self.line

            def samples(self) -> int:
                return 1000

            def fingerprint(self) -> dict[str, str]:
                return {"data": "y = 3x - 1"}

            def batches(self, plan: BatchPlan) -> Iterator[Points]:
                for positions in map(torch.tensor, plan.micro_batches()):
                    x = rng.uniform(plan.seed, "points", positions, columns=1).float()
                    yield Points(x, positions, indices=positions % self.samples())

            def step(self, model: nn.Module, batch: Points) -> StepResult:
                errors = model(batch.x) - (3 * batch.x - 1)
                return StepResult(errors.square().sum(), weight=errors.new_tensor(errors.numel()))

        config = TrainConfig(out="runs/line", steps=100, batch_size=8, lr=0.1, device="cpu")
        train(LineTask(config.seed), config, "line")
    """

    seed: int
    device: torch.device
    micro_batch: int | None = None
    """Samples per forward pass, set by the loop; None for all samples of a rank's step."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The module that is trained, averaged (EMA) and saved in checkpoints. It need not hold frozen helpers.

        In sharded runs, ranks other than the main one may build it on the meta device. The loop fills it from the
        main rank.
        """

    @abstractmethod
    def samples(self) -> int:
        """Number of training samples in one epoch."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Digests of everything besides the config that must not change on resume, by name: data, starting weights.

        The main rank's fingerprint is used.
        """

    def data_files(self) -> Iterator[tuple[str, str]]:
        """(name, path) of the local files of the samples, by which a resumed run notices that they changed."""
        return iter(())

    @abstractmethod
    def batches(self, plan: BatchPlan) -> Iterator[Any]:
        """This rank's micro-batches in order: ``global_batch / world_size / micro_batch`` of them per step.

        Each is a named tuple with the fields ``positions`` (in the stream) and ``indices`` (in the data), both int64
        ``(samples,)``, ``bad`` (a tuple of (name, reason) for unreadable samples) and the method's own fields. The loop
        moves all tensors to the device, except positions and indices.
        """

    @property
    def micro_batch_multiple(self) -> int:
        """Micro-batch sizes must be a multiple of this. More than 1 if a step mixes neighbouring samples."""
        return 1

    def worst_case_batch(self, samples: int) -> Any:
        """A micro-batch that needs as much memory as any with this number of samples. Has no side effects."""
        return next(iter(self.batches(BatchPlan(self.seed, samples, samples, 0, 1, 0, 0, 1, False))))

    @abstractmethod
    def step(self, model: nn.Module, batch: Any) -> StepResult:
        """Compute the loss of one micro-batch.

        A micro-batch without any term of the loss must return a sum of zero that still has a gradient.

        Args:
            model: :attr:`module`, perhaps wrapped or sharded. Call this one, not :attr:`module`.
            batch: On the task's device.
        """

    def lr_factors(self) -> Mapping[str, float]:
        """Submodule name -> factor of the run's learning rate; inner submodules first."""
        return {}

    def throughput(self, batch: Any) -> dict[str, int]:
        """Counts of a micro-batch other than samples, by name; logged as ``<name>_per_second``."""
        return {}

    def to(self, device: torch.device) -> None:
        """Move all modules to the device."""
        self.device = device
        self.module.to(device)

    def on_train_start(self, context: DistributedContext, plan: BatchPlan) -> None:
        """Prepare a fresh run (not a resumed one) before step 0. Must leave every rank with the same state."""

    def validate(self, module: nn.Module, context: DistributedContext) -> dict[str, float]:
        """Metrics on held-out data, the same on every rank. The lowest ``val_loss`` marks the best checkpoint.

        In a sharded run, every rank must call the module equally often; otherwise ranks wait for each other forever.
        """
        return {}

    def check_skipped(self, images: Mapping[str, str]) -> None:
        """Check how many images were unreadable so far.

        Args:
            images: Name -> reason, from all ranks.

        Raises:
            UserError: There are too many.
        """

    def monitor(self, batch: Any) -> dict[str, float]:
        """Extra values for a log line. Runs on the main rank only and must not call a sharded module."""
        return {}

    def shard_units(self, module: nn.Module) -> Sequence[nn.Module]:
        """Submodules that a sharded run gathers one at a time, inner ones before outer ones.

        Args:
            module: :attr:`module` or its average.

        Raises:
            UserError: The method does not support sharding.
        """
        raise UserError("this command does not support sharding; leave --sharding at none")

    def unsharded(self, module: nn.Module) -> Sequence[nn.Module]:
        """Frozen submodules of which every rank of a sharded run keeps a full copy."""
        return ()

    def checkpointed(self, name: str) -> bool:
        """Whether checkpoints hold this tensor of :attr:`module`. They must hold all trainable ones.

        A frozen tensor may be left out if a resumed run builds it anew and the :meth:`fingerprint` covers it.
        """
        return True

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state to save in checkpoints besides the module's weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def compile(self) -> None:
        """Compile the modules in place with torch.compile."""
        self.module.compile()

    def set_grad_checkpointing(self) -> None:
        """Turn on gradient checkpointing: recompute activations in the backward pass."""
        raise NotImplementedError(f"{type(self).__name__} has no gradient checkpointing")

    def summary(self) -> dict[str, Any]:
        """Entries about the method for ``results.json``."""
        return {}

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """Write the trained model for later use. Runs on the main rank only.

        Args:
            module: :attr:`module` or its average; after a sharded run, an unsharded copy on the CPU.
            folder: To write to.
            provenance: Command, config and versions to save with the weights.
        """
