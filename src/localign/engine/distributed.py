"""Processes. Every function is correct with one of them.

Beside this module only ``sharding`` and ``sharded_checkpoint`` call torch.distributed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from localign.errors import RunFailure, UserError

T = TypeVar("T")
TIMEOUT = 1800.0
"""Seconds that ranks wait for one another, where nothing else is said."""
_LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|[Tt]imed out|Socket Timeout|Connection refused")


@dataclass(frozen=True)
class DistributedContext:
    """This process among all of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1
    """Processes on this node."""
    timeout: float = TIMEOUT
    """Seconds that ranks wait for one another."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of a tensor over ranks; the input is not changed."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def all_gather_object(self, value: T) -> list[T]:
        """Small Python objects of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.all_gather_object(flag))

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """What one rank cannot do inside (UserError, RunFailure), all have failed to do: none waits for it."""
        problem: UserError | RunFailure | None = None
        try:
            yield
        except (UserError, RunFailure) as error:
            problem = error
        found = self.all_gather_object(problem)
        if problem is not None:
            raise problem
        for other in found:
            if other is not None:
                other.already_reported = True  # by the rank that it happened to
                raise other

    def wrap_ddp(self, module: nn.Module, bucket_mb: float | None = None) -> nn.Module:
        """The module with gradients averaged over ranks, so many MiB of them at a time."""
        if self.size == 1:
            return module
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Gradients lie in the buckets that are exchanged, rather than beside them.
        return DistributedDataParallel(
            module,
            device_ids=device_ids,
            broadcast_buffers=False,
            bucket_cap_mb=bucket_mb,
            gradient_as_bucket_view=True,
        )

    @contextmanager
    def without_sync(self, module: nn.Module, skip: bool) -> Iterator[None]:
        """Inside, gradients stay on their rank if ``skip``: for all but the last micro-batch of a step.

        A sharded module exchanges them after every one: kept, they would be whole on every rank, which is what
        sharding is there to avoid.
        """
        if skip and isinstance(module, DistributedDataParallel):
            with module.no_sync():
                yield
        else:
            yield

    def mesh(self, per_node: bool) -> DeviceMesh:
        """The ranks that parameters are sharded over: all, or each node's, with the nodes as replicas.

        Raises:
            UserError: The device is none that models are sharded on.
        """
        if self.device.type not in ("cpu", "cuda"):
            raise UserError(f"--sharding works on CUDA GPUs and CPUs, not on {self.device.type}")
        if per_node:
            shape = (self.size // self.local_size, self.local_size)
            return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))

    def cpu_group(self) -> dist.ProcessGroup:
        """A further group of all ranks, for what they exchange beside the training."""
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        assert isinstance(group, dist.ProcessGroup)
        return group


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a name; ``auto`` prefers CUDA, then Apple's GPU, then the CPU.

    Raises:
        UserError: The name is none of torch's, or the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; give auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"there is no device {name}: torch finds no CUDA GPU")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UserError(f"there is no device {name}: torch finds {torch.cuda.device_count()} CUDA GPUs")
        return device if device.index is not None else torch.device("cuda", local_rank)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("there is no device mps on this machine")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name} is not supported; give auto, cpu, cuda, cuda:N or mps")
    return device


def is_main_process() -> bool:
    """Whether this process becomes the main rank; known before there is a process group."""
    return _rank() == 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextmanager
def distributed_context(
    device: str = "auto", sharded: bool = False, timeout: float = TIMEOUT
) -> Iterator[DistributedContext]:
    """The process group of a ``torchrun`` launch, or a world of one. gloo on CPU, nccl on CUDA.

    Args:
        device: As for :func:`choose_device`.
        sharded: A world of one has a process group too, which sharding needs.
        timeout: Seconds that ranks wait for one another.

    Raises:
        RunFailure: From inside, where another rank died or did not answer in time.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = _rank(), int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    ours = (size > 1 or sharded) and not dist.is_initialized()
    if ours:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **alone)
    try:
        yield DistributedContext(rank, size, local_rank, chosen, local_size, timeout)
    except RuntimeError as error:
        # gloo has no error class of its own; nccl's watchdog ends the process by itself.
        if size == 1 or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        told = str(error).splitlines()[0].partition(" This is typically")[0]
        raise RunFailure(
            f"rank {rank} lost another rank, which died or did not answer for {timeout:g} s (--timeout): {told}"
        ) from error
    finally:
        if ours:
            dist.destroy_process_group()
