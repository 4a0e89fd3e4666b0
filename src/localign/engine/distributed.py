"""The processes of a run. Every function also works with a single process.

Only this module, ``sharding`` and ``checkpoints.sharded`` call torch.distributed.
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
"""Default number of seconds that ranks wait for one another."""
_LOST = re.compile(
    r"closed by peer|reset by peer|Broken pipe|[Tt]imed out|Socket Timeout|Connection refused|NCCL (error|communicator)"
    r"|Duplicate GPU"
)


@dataclass(frozen=True)
class DistributedContext:
    """This process and the others of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1
    """Number of processes on this node."""
    timeout: float = TIMEOUT
    """Seconds that ranks wait for one another."""

    @property
    def is_main(self) -> bool:
        """Whether this process (rank 0) writes files and shows progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank gets here."""
        if self.size > 1:
            dist.barrier()

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of a tensor over ranks. The input is unchanged."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def all_gather_object(self, value: T) -> list[T]:
        """The objects of all ranks, in rank order, on every rank; for small Python objects."""
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
        """Raise a UserError or RunFailure of one rank on every rank, so that no rank waits for a failed rank."""
        own: UserError | RunFailure | None = None
        try:
            yield
        except (UserError, RunFailure) as error:
            own = error
        errors = self.all_gather_object(own)
        if own is not None:
            raise own
        for other in errors:
            if other is not None:
                other.already_reported = True  # by the rank that failed
                raise other

    def wrap_ddp(self, module: nn.Module, bucket_mb: float | None = None) -> nn.Module:
        """The module in DistributedDataParallel, or as it is with one rank.

        Args:
            module: On this rank's device.
            bucket_mb: MiB of gradients that ranks exchange at once; None for torch's default.
        """
        if self.size == 1:
            return module
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            module,
            device_ids=device_ids,
            broadcast_buffers=False,
            bucket_cap_mb=bucket_mb,
            gradient_as_bucket_view=True,  # no second copy of the gradients
        )

    @contextmanager
    def without_sync(self, module: nn.Module, skip: bool) -> Iterator[None]:
        """Do not exchange gradients inside the block if ``skip``: for all but the last micro-batch of a step.

        A sharded module still exchanges them after every micro-batch. Otherwise every rank would hold full gradients.
        """
        if skip and isinstance(module, DistributedDataParallel):
            with module.no_sync():
                yield
        else:
            yield

    def mesh(self, per_node: bool) -> DeviceMesh:
        """The device mesh for sharding.

        Args:
            per_node: Shard over the ranks of each node and replicate over nodes; False shards over all ranks.

        Raises:
            UserError: Models cannot be sharded on this device.
        """
        if self.device.type not in ("cpu", "cuda"):
            raise UserError(f"--sharding works on CUDA GPUs and CPUs, not on {self.device.type}")
        if per_node:
            shape = (self.size // self.local_size, self.local_size)
            return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))

    def cpu_group(self) -> dist.ProcessGroup:
        """A new gloo group of all ranks, for communication in another thread than training."""
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        assert isinstance(group, dist.ProcessGroup)
        return group


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device with a name. ``auto`` picks CUDA, then Apple's GPU, then the CPU.

    Raises:
        UserError: torch does not know the name, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _gpu_of_rank(local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; give auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"there is no device {name}: torch finds no CUDA GPU")
        if device.index is not None:
            return _existing_gpu(device, f"there is no device {name}")
        return _gpu_of_rank(local_rank)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("there is no device mps on this machine")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name} is not supported; give auto, cpu, cuda, cuda:N or mps")
    return device


def _gpu_of_rank(local_rank: int) -> torch.device:
    hint = f"rank {local_rank} of this node has no GPU; start at most one process per GPU (--nproc-per-node)"
    return _existing_gpu(torch.device("cuda", local_rank), hint)


def _existing_gpu(device: torch.device, problem: str) -> torch.device:
    count = torch.cuda.device_count()
    if device.index < count:
        return device
    found = "one CUDA GPU, cuda:0" if count == 1 else f"{count} CUDA GPUs, cuda:0 to cuda:{count - 1}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible}, and its GPUs are counted from 0)"
    raise UserError(f"{problem}: torch finds {found}{why}")


def is_main_process() -> bool:
    """Whether this process is rank 0 of its launch. Works before there is a process group."""
    return _rank() == 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _cause(message: str) -> str:
    """The line of gloo's or nccl's message that says what happened."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith("Last error:"):  # nccl: the lines before name a C++ file and its version
            return line.removeprefix("Last error:").strip() or lines[min(number + 1, len(lines) - 1)]
    return lines[0].partition(" This is typically")[0] if lines else "no message"


@contextmanager
def distributed_context(
    device: str = "auto", sharded: bool = False, timeout: float = TIMEOUT
) -> Iterator[DistributedContext]:
    """The processes of a ``torchrun`` launch, or a single process. gloo on CPU, nccl on CUDA.

    Args:
        device: As for :func:`choose_device`.
        sharded: Make a process group for a single process too; sharding needs one.
        timeout: Seconds that ranks wait for one another.

    Raises:
        RunFailure: Inside the block, another rank died or did not answer in time.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = _rank(), int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = choose_device(device, local_rank)
    if local_size > 1 and chosen.type == "cuda" and device not in ("auto", "cuda"):
        raise UserError(
            f"--device {device} is one GPU for {local_size} processes; give --device cuda, which is one GPU for each"
        )
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    starts_group = (size > 1 or sharded) and not dist.is_initialized()
    if starts_group:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        single: dict[str, Any] = {}
        if size == 1:
            store = dist.HashStore()  # type: ignore[attr-defined,unused-ignore]
            single = {"store": store, "rank": 0, "world_size": 1}
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **single)
    try:
        yield DistributedContext(rank, size, local_rank, chosen, local_size, timeout)
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors; nccl's watchdog ends the process itself.
        if size == 1 or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        raise RunFailure(
            f"rank {rank} lost another rank, which died or did not answer for {timeout:g} s (--timeout): "
            f"{_cause(str(error))}"
        ) from error
    finally:
        if starts_group:
            dist.destroy_process_group()
