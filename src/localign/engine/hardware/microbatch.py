"""`--micro-batch auto`: find the largest number of samples per forward pass that fits in memory.

The micro-batch size changes neither the samples of a step nor the sums over them, only the number of passes per step.
So the search may find another size when a run is resumed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from localign.engine.batch import tensors_of, to_device
from localign.engine.distributed import DistributedContext
from localign.engine.hardware.memory import MEMORY_SHARE, Meter, meter
from localign.engine.log import say
from localign.engine.optim.build import local_tensors
from localign.engine.task import Task
from localign.engine.verdict import runs_ahead
from localign.errors import UserError

_MOMENTS = 2
"""State tensors of AdamW per parameter."""


class MicroBatchFinder:
    """Tries forward and backward passes of growing size. All ranks try the same sizes.

    Replicated models on GPUs are tried until one rank is out of memory. Two cases cannot recover from that: on a CPU
    the kernel kills the process, and a sharded rank that stops leaves the others waiting. There, a size is tried only
    if the peaks of the two previous sizes predict that it fits.

    Args:
        task: On its device, between steps.
        model: The task's module, replicated or sharded, without gradients.
        context: This rank.
        per_rank: Samples per rank and step.
        autocast: Makes the context for a forward pass.
        sharded: Whether the model is sharded over ranks.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        context: DistributedContext,
        per_rank: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        sharded: bool,
    ) -> None:
        self.task, self.model, self.context = task, model, context
        self.per_rank, self.autocast = per_rank, autocast
        self.communicates = sharded and context.size > 1
        self.predicts = self.communicates or context.device.type == "cpu"
        self.peaks: list[tuple[int, int]] = []  # (samples, bytes) in the order of trials

    def find(self) -> int:
        """The largest micro-batch size that fits on every rank and divides the samples per rank.

        Weights, gradients and torch's random generators are unchanged afterwards.

        Raises:
            UserError: Even the smallest size does not fit.
        """
        least = self.task.micro_batch_multiple
        sizes = [n for n in range(least, self.per_rank + 1, least) if self.per_rank % n == 0]
        if sizes == [self.per_rank]:
            return self.per_rank
        # A prediction needs two peaks, so the second size is tried even if it is not a divisor.
        trials = sorted({least, 2 * least, *sizes}) if self.predicts else sizes
        found, cuda = 0, [self.context.device] if self.context.device.type == "cuda" else []
        memory_meter = meter(self.context)
        self.model.train()
        # Predicted sizes stay below the budget, so no limit is needed.
        limit = nullcontext() if self.predicts else _memory_limit(self.context.device)
        with torch.random.fork_rng(cuda), limit:
            for size in trials:
                if self.context.any_rank(not self._should_fit(size, memory_meter)):
                    break
                if self.context.any_rank(not self._fits(size, memory_meter)):
                    break
                found = size if size in sizes else found
        self._clear()
        with self.context.raise_on_all_ranks():
            if not found and self.context.is_main:
                raise UserError(
                    f"not even a micro-batch of {least} fits in the memory of {self.context.device}; try "
                    "--grad-checkpointing"
                )
        if self.context.is_main:
            say(f"micro-batch: {found} of the {self.per_rank} samples per rank and step")
        return found

    def _should_fit(self, size: int, memory_meter: Meter) -> bool:
        """Extrapolate the last two peaks to a size. True without a prediction."""
        if not self.predicts or len(self.peaks) < 2:
            return True
        (before, low), (last, high) = self.peaks[-2:]
        growth = max(0.0, (high - low) / (last - before))
        return high + growth * (size - last) <= memory_meter.budget

    def _fits(self, size: int, memory_meter: Meter) -> bool:
        """Run a step's passes without the optimizer, and check the peak."""
        memory_meter.restart()
        fits = True
        try:
            self._passes(size)
        except torch.OutOfMemoryError:
            if self.communicates:
                raise  # the other ranks wait for this one
            fits = False
        peak = memory_meter.peak()
        self.peaks.append((size, peak))
        self._clear()
        return fits and (not self.predicts or peak <= memory_meter.budget)

    def _passes(self, size: int) -> None:
        times = max(1, self.per_rank // size)
        batch = to_device(self.task.worst_case_batch(size), self.context.device)
        # The loop holds all batches of a step until it has read the step's verdict, on GPUs one step later.
        copies = times * (2 if runs_ahead(self.context.device) else 1) - 1
        held = [t.clone() for t in tensors_of(batch).values() for _ in range(copies)]
        # The optimizer allocates its state in the first step.
        trained = local_tensors(p for p in self.task.module.parameters() if p.requires_grad)
        held += [torch.ones_like(t) for t in trained for _ in range(_MOMENTS)]
        for _ in range(min(2, times)):  # the second pass already has gradients
            with self.context.without_sync(self.model, skip=True):
                with self.autocast():
                    result = self.task.step(self.model, batch)
                torch.autograd.backward(result.loss_sum)
        del held

    def _clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _memory_limit(device: torch.device) -> Iterator[None]:
    """Let torch use only a share of a GPU's memory inside the block."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE * before, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
