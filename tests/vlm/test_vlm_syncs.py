"""Training of vision-language models waits for a GPU at log lines only; see ``sync_counter``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sync_counter import DEVICE, SyncCounter, counted_syncs
from vlm_runs import arguments

from localign.cli import parse
from localign.engine import verdict
from localign.engine.distributed import DistributedContext
from localign.engine.loop import Loop
from localign.engine.task import BatchPlan
from localign.signals import stop_requests
from localign.vlm.data.batching import VLMBatch
from localign.vlm.model import attention
from localign.vlm.model.losses import next_token_targets
from localign.vlm.task import VLMTask


class Watched(VLMTask):
    """Notes how many waits each step made."""

    counter: SyncCounter

    def batches(self, plan: BatchPlan) -> Iterator[VLMBatch]:
        self.steps: list[Counter[str]] = []
        batches = super().batches(plan)
        while True:
            self.steps.append(Counter(self.counter.waits))
            self.counter.counting = False
            batch = next(batches, None)
            self.counter.counting = True
            self.counter.waits.clear()
            if batch is None:
                return
            yield batch


def kernel(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Stands for the varlen kernel."""
    return q * 1.0


def test_steps_between_log_lines_do_not_wait(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On packed rows. With padded rows transformers moves masks to ``inputs_embeds.device``, which is no GPU here."""
    monkeypatch.setattr(verdict, "LATE_DEVICES", {"cpu"})
    monkeypatch.setattr(attention, "VARLEN", kernel)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda *_: True)
    more = ["--log-every", "3", "--checkpoint-every", "100"]
    config = parse("vlm train", arguments(data, tmp_path / "run", *more)[2:])
    task = Watched(config)
    with stop_requests() as stop, counted_syncs(monkeypatch) as counter:
        task.counter = counter
        loop = Loop(task, config, "vlm train", DistributedContext(0, 1, 0, DEVICE), stop)
        try:
            loop.run()
        finally:
            loop.close()
    quiet = [task.steps[i] for i in (1, 2, 4, 5)]
    assert not any(quiet), quiet
    assert task.steps[3], "the counter sees the waits of log lines"


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_the_loader_counts_what_the_model_would(data: Path, tmp_path: Path, batching: str) -> None:
    config = parse("vlm train", arguments(data, tmp_path / "run", "--batching", batching)[2:])
    task = VLMTask(config)
    for batch in task.batches(BatchPlan(0, 8, 4, 0, 1, 0, 0, 4, False)):
        targets = next_token_targets(batch.labels, batch.cu_seqlens).flatten()
        assert batch.predicted is not None
        assert torch.equal(batch.predicted, (targets != -100).nonzero().flatten())
        assert torch.equal(batch.labels.flatten()[batch.predicted + 1], targets[batch.predicted])
        counted = task.step(task.model, batch)
        plain = task.step(task.model, batch._replace(predicted=None, counts=None))
        assert torch.equal(counted.loss_sum, plain.loss_sum)
        assert torch.equal(counted.weight, plain.weight)
        gradients = []
        for result in (counted, plain):
            task.model.zero_grad()
            result.loss_sum.backward()
            gradients.append({n: p.grad for n, p in task.model.named_parameters() if p.grad is not None})
        assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[1])
