"""What a method is to the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localign.engine.distributed import DistributedContext
from localign.errors import UserError
from localign.options.train import TrainConfig


@dataclass(frozen=True)
class BatchPlan:
    """Which part of the stream of samples this rank is to see."""

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
    """A rank's plan.

    Args:
        config: Of the run.
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
    )


@dataclass
class StepResult:
    """A loss as a sum and what it went over, so that means do not depend on ranks and micro-batches."""

    loss_sum: Tensor
    """Scalar with gradient: the loss summed over its terms (tokens, samples, ...)."""
    weight: Tensor
    """Scalar: how many terms."""
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Further things to log: name -> (sum, count), detached."""


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
    """Samples of a forward pass, as the loop has them of the options or has found them; None: a rank's whole share."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """What is trained, averaged (EMA), and saved in checkpoints. Frozen helpers stay outside of it.

        In sharded runs ranks other than the main one may have tensors of it on the meta device; they are given
        their shares of the main rank's.
        """

    @abstractmethod
    def samples(self) -> int:
        """Training samples in one epoch."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What a continued run must agree on beside its config, by name: data, starting weights.

        What the main rank says counts.
        """

    @abstractmethod
    def batches(self, plan: BatchPlan) -> Iterator[Any]:
        """This rank's micro-batches, in order: as many per step as its share holds ``plan.micro_batch``.

        Each is a named tuple with the fields ``positions`` and ``indices`` (int64 ``(samples,)``: in the stream,
        and in the data), ``bad`` ((name, reason) of what could not be read), and the method's own; its tensors
        are moved to the device, positions and indices excepted.
        """

    @property
    def micro_batch_multiple(self) -> int:
        """Neighbours in the stream that go through one forward pass together: micro-batches hold a multiple."""
        return 1

    def worst_case_batch(self, samples: int) -> Any:
        """A micro-batch that needs as much memory as any of so many samples; reading it changes nothing."""
        return next(iter(self.batches(BatchPlan(self.seed, samples, samples, 0, 1, 0, 0, 1, False))))

    @abstractmethod
    def step(self, model: nn.Module, batch: Any) -> StepResult:
        """One micro-batch. Without any term of the loss it gives a sum of zero, which has a gradient all the same.

        Args:
            model: :attr:`module`, perhaps compiled, replicated or sharded; call it instead of the bare module.
            batch: On the task's device.
        """

    def lr_factors(self) -> Mapping[str, float]:
        """Submodules of :attr:`module` with a learning rate of their own, as a factor of the run's; inner ones come
        first."""
        return {}

    def throughput(self, batch: Any) -> dict[str, int]:
        """What a micro-batch of this rank holds beside its samples, by name: logged as ``<name>_per_second``."""
        return {}

    def to(self, device: torch.device) -> None:
        """Move everything to the device."""
        self.device = device
        self.module.to(device)

    def on_train_start(self, context: DistributedContext, plan: BatchPlan) -> None:
        """Prepare a fresh run (not a continued one) before step 0, the same on every rank."""

    def validate(self, module: nn.Module, context: DistributedContext) -> dict[str, float]:
        """Metrics on held-out data, the same on every rank; ``val_loss`` decides which checkpoint is best.

        In a sharded run every rank calls the module equally often, or they wait for one another.
        """
        return {}

    def check_skipped(self, images: Mapping[str, str]) -> None:
        """Judge the unreadable images (name -> reason) that all ranks have met so far.

        Raises:
            UserError: There are too many.
        """

    def monitor(self, batch: Any) -> dict[str, float]:
        """Cheap extra readings for a log line, on the main rank only; without calling a sharded module."""
        return {}

    def shard_units(self, module: nn.Module) -> Sequence[nn.Module]:
        """Submodules that sharded runs gather one at a time, inner before outer; in none: the rest, gathered longest.

        Args:
            module: :attr:`module` or its average.

        Raises:
            UserError: The method does not train sharded modules.
        """
        raise UserError("this command trains its model whole on every rank; leave --sharding at none")

    def unsharded(self, module: nn.Module) -> Sequence[nn.Module]:
        """Frozen submodules that every rank of a sharded run keeps whole."""
        return ()

    def checkpointed(self, name: str) -> bool:
        """Whether checkpoints hold this tensor of :attr:`module`.

        A frozen one need not be there where a continued run builds it anew, and its :meth:`fingerprint` says so.
        """
        return True

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state beside the module's weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take :meth:`state_dict` back."""

    def compile(self) -> None:
        """Compile what is worth compiling, in place."""
        self.module.compile()

    def set_grad_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        raise NotImplementedError(f"{type(self).__name__} has no gradient checkpointing")

    def summary(self) -> dict[str, Any]:
        """What ``results.json`` says about the method."""
        return {}

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """Write the trained model where others can load it, on the main rank only.

        Args:
            module: :attr:`module` or its average; of a sharded run a whole copy, on the CPU.
            folder: Where to.
            provenance: Command, config and versions, to be kept with the weights.
        """
