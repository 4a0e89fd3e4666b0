"""`--micro-batch auto`: as many samples in a forward pass as the device's memory has room for.

The samples of a step, and what is summed over them, do not depend on the micro-batch; only how often a rank goes
forward and backward in a step does. So the search may come out differently whenever a run is continued.
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
from localign.engine.hardware.memory import ROOM, Meter, meter
from localign.engine.log import say
from localign.engine.optim.build import local_tensors
from localign.engine.task import Task
from localign.errors import UserError

_MOMENTS = 2
"""AdamW's tensors per parameter."""


class MicroBatchFinder:
    """Tries forward and backward passes of one size after another, upwards; all ranks take the same steps.

    Replicas on GPUs go on until one of them is out of memory. Where that could not be survived (on a CPU, where
    the kernel ends the process; among sharded ranks, of which one cannot stop by itself), each size is tried
    only if the peaks of the two before it say that it will fit.

    Args:
        task: In its state before a step, on its device.
        model: Its module, replicated or sharded; no gradients are there.
        context: This rank.
        per_rank: Samples of a rank and step.
        autocast: What a forward pass is done in.
        sharded: Whether ranks exchange parts of the model within a pass.
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
        self.task, self.model, self.context, self.per_rank, self.autocast = (
            task,
            model,
            context,
            per_rank,
            autocast,
        )
        self.exchanging = sharded and context.size > 1
        self.foresees = self.exchanging or context.device.type == "cpu"
        self.peaks: list[tuple[int, int]] = []  # of (samples, bytes), in the order they were tried

    def find(self) -> int:
        """The largest micro-batch that fits on every rank and divides a rank's share.

        Weights, gradients and torch's generators are left as they were.

        Raises:
            UserError: Not even the smallest fits.
        """
        least = self.task.micro_batch_multiple
        sizes = [n for n in range(least, self.per_rank + 1, least) if self.per_rank % n == 0]
        if sizes == [self.per_rank]:
            return self.per_rank
        # Growth takes two sizes to be seen, whether the second divides the share or not.
        tried = sorted({least, 2 * least, *sizes}) if self.foresees else sizes
        found, cuda = 0, [self.context.device] if self.context.device.type == "cuda" else []
        gauge = meter(self.context)
        self.model.train()
        # What is foreseen keeps away from the end by itself.
        limited = nullcontext() if self.foresees else _limited(self.context.device)
        with torch.random.fork_rng(cuda), limited:
            for size in tried:
                if self.context.any_rank(not self._foreseen(size, gauge)) or self.context.any_rank(
                    not self._fits(size, gauge)
                ):
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
            say(f"micro-batch: {found} of the {self.per_rank} samples of a rank and step")
        return found

    def _foreseen(self, size: int, gauge: Meter) -> bool:
        """Whether the size should fit, as far as can be told."""
        if not self.foresees or len(self.peaks) < 2:
            return True
        (before, low), (last, high) = self.peaks[-2:]
        growth = max(0.0, (high - low) / (last - before))
        return high + growth * (size - last) <= gauge.budget

    def _fits(self, size: int, gauge: Meter) -> bool:
        """Do what a step does but for its end, and see."""
        gauge.restart()
        fits = True
        try:
            self._passes(size)
        except torch.OutOfMemoryError:
            if self.exchanging:
                raise  # the others wait for this rank within the pass
            fits = False
        peak = gauge.peak()
        self.peaks.append((size, peak))
        self._clear()
        return fits and (not self.foresees or peak <= gauge.budget)

    def _passes(self, size: int) -> None:
        times = max(1, self.per_rank // size)
        batch = to_device(self.task.worst_case_batch(size), self.context.device)
        # The loop keeps the batches of a step until its end.
        kept = [t.clone() for t in tensors_of(batch).values() for _ in range(times - 1)]
        # The optimizer takes its memory at its first step.
        trained = local_tensors(p for p in self.task.module.parameters() if p.requires_grad)
        kept += [torch.ones_like(t) for t in trained for _ in range(_MOMENTS)]
        for _ in range(min(2, times)):  # the second time with gradients there
            with self.context.without_sync(self.model, skip=True):
                with self.autocast():
                    result = self.task.step(self.model, batch)
                result.loss_sum.backward()
        del kept

    def _clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.context.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.compiler.reset()  # attention was compiled for sizes that do not come again


@contextmanager
def _limited(device: torch.device) -> Iterator[None]:
    """Inside, a GPU is out of memory while it still has some."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(ROOM * before, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
