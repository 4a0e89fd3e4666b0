"""On GPUs the loop reads a step's verdict one step late: the same weights and messages, and no waits between logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sharded_runs
import torch
from engine_runs import DisturbedAlignment, logged, run, run_until, same_bits, tiny, weights
from safetensors.torch import load_file
from sync_counter import DEVICE, SyncCounter, counted_syncs
from torch import nn

from localign.data.loader import Batch
from localign.engine import StepResult, verdict
from localign.engine.distributed import DistributedContext
from localign.engine.log import read_log
from localign.engine.loop import Loop
from localign.engine.task import BatchPlan
from localign.errors import RunFailure
from localign.signals import stop_requests


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read verdicts late on CPUs too."""
    monkeypatch.setattr(verdict, "LATE_DEVICES", {"cpu"})


@pytest.mark.parametrize("log_every", [1, 3])
def test_late_verdicts_give_the_same_run(
    tmp_path: Path, images: Path, log_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {
        "ema_decay": 0.9, "log_every": log_every, "checkpoint_every": 4, "keep_checkpoints": 9, "micro_batch": 4,
    }  # fmt: skip
    disturbances: dict[str, Any] = {"poison": (1, 4, 5), "poison_gradient": (2,)}
    outcomes = []
    for name in ("at once", "late"):
        monkeypatch.setattr(verdict, "LATE_DEVICES", {"cpu"} if name == "late" else set())
        outcomes.append(run(tiny(tmp_path / name, images, **values), **disturbances).results)
    for field in ("loss", "grad_norm", "samples", "skipped"):
        assert logged(tmp_path / "at once", field) == logged(tmp_path / "late", field), field
    for step in (4, 8):
        for file in ("model", "ema", "optimizer"):
            a, b = (weights(tmp_path / name, step, f"{file}.safetensors") for name in ("at once", "late"))
            assert same_bits(a, b), (step, file)
    assert outcomes[0]["skipped_steps"] == outcomes[1]["skipped_steps"] == [2, 3, 5, 6]


def test_a_sharded_run_leaves_out_a_step_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("at once", "late"):
        monkeypatch.setattr(verdict, "LATE_DEVICES", {"cpu"} if name == "late" else set())
        config = sharded_runs.token(tmp_path / name, log_every=3, checkpoint_every=100)
        assert sharded_runs.run(config, poison=4).results["skipped_steps"] == [5]
    exports = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("at once", "late")]
    assert same_bits(*exports)
    assert logged(tmp_path / "at once", "loss") == logged(tmp_path / "late", "loss")


def test_messages_name_the_step_they_are_about(
    tmp_path: Path, images: Path, late: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny(tmp_path, images, steps=6, log_every=6), poison=(2,))
    assert "step 3: loss nan, gradient norm nan; skipped" in capsys.readouterr().err
    assert {f.name[:12] for f in (tmp_path / "nonfinite").iterdir()} == {"step-0000003"}


def test_a_run_that_does_not_recover_ends_with_the_weights_before_it(
    tmp_path: Path, images: Path, late: None
) -> None:
    config = tiny(tmp_path, images, log_every=100, checkpoint_every=3)
    with pytest.raises(RunFailure, match=r"3 steps in a row \(last: step 6, loss nan"):
        run(config, poison=(3, 4, 5))
    assert all(torch.isfinite(t).all() for t in weights(tmp_path, 3).values())
    assert not any("loss" in entry for entry in read_log(tmp_path))


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, images: Path, late: None) -> None:
    values: dict[str, Any] = {"ema_decay": 0.9, "checkpoint_every": 4, "log_every": 100}
    run(tiny(tmp_path / "whole", images, **values), poison=(3,))
    run_until(tiny(tmp_path / "part", images, **values), 6, poison=(3,))
    run(tiny(tmp_path / "part", images, resume="must", **values))
    for file in ("model", "ema", "optimizer"):
        a, b = (weights(tmp_path / name, 8, f"{file}.safetensors") for name in ("whole", "part"))
        assert same_bits(a, b), file


class Watched(DisturbedAlignment):
    """An alignment that notes how many waits each step made."""

    counter: SyncCounter

    def batches(self, plan: BatchPlan) -> Iterator[Batch]:
        self.per_batch: list[Counter[str]] = []
        for batch in super().batches(plan):
            self.per_batch.append(Counter(self.counter.waits))
            self.counter.waits.clear()
            yield batch

    def steps(self) -> list[Counter[str]]:
        """The waits from each batch to the next, and from the last one to the end of the run."""
        return [*self.per_batch[1:], Counter(self.counter.waits)]


@contextmanager
def watched(task: Any, config: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """A loop on the device that counts."""
    monkeypatch.setattr(verdict, "LATE_DEVICES", {"cpu"})
    context = DistributedContext(0, 1, 0, DEVICE)
    with stop_requests() as stop, counted_syncs(monkeypatch) as counter:
        task.counter = counter
        loop = Loop(task, config, "align", context, stop)
        try:
            yield loop
        finally:
            loop.close()


OBJECTIVES: dict[str, dict[str, Any]] = {
    "maskembed": {},
    "average of the weights": {"ema_decay": 0.9},
    "hidden tokens": {"loss_tokens": "hidden"},
    "two micro-batches": {"micro_batch": 4},
    "maskembed+": {"objective": "maskembed+"},
    "clipself": {"objective": "clipself", "target": "cls", "loss": "cosine", "decoder": "transformer"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_alignment_waits_for_the_device_at_log_lines_only(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = tiny(tmp_path, images, steps=7, log_every=3, checkpoint_every=100, **OBJECTIVES[name])
    task = Watched(config)
    with watched(task, config, monkeypatch) as loop:
        loop.run()
    per_step = 8 // (config.micro_batch or 8) if config.micro_batch != "auto" else 1
    waits = task.steps()
    steps = [sum(waits[i : i + per_step], Counter()) for i in range(0, len(waits), per_step)]
    quiet = [steps[i] for i in (0, 1, 3, 4)]
    assert not any(quiet), quiet
    assert all(steps[i] for i in (2, 5)), "the counter sees the waits of log lines"


def test_the_counter_sees_a_wait_that_is_added(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Careless(Watched):
        def step(self, model: nn.Module, batch: Batch) -> StepResult:
            result = super().step(model, batch)
            float(result.loss_sum)
            return result

    config = tiny(tmp_path, images, steps=4, log_every=100, checkpoint_every=100)
    task = Careless(config)
    with watched(task, config, monkeypatch) as loop:
        loop.run()
    assert task.steps()[1]
