"""A step with a non-finite loss or gradient is skipped; three in a row end the run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_runs import COMMAND, DisturbedAlignment, logged, run, run_until, same_bits, tiny, weights
from safetensors import safe_open
from safetensors.torch import load_file

from localign.data.loader import Batch
from localign.engine import train
from localign.engine.log import read_log
from localign.engine.task import BatchPlan, StepResult
from localign.errors import RunFailure


def test_a_step_with_nan_loss_does_not_change_the_weights(tmp_path: Path, images: Path) -> None:
    config = tiny(tmp_path, images, steps=4, checkpoint_every=1, keep_checkpoints=9, ema_decay=0.9)
    results = run(config, poison=(2,)).results
    for file in ("model", "optimizer", "ema"):
        before, after = (weights(tmp_path, step, f"{file}.safetensors") for step in (2, 3))
        assert same_bits(before, after), file
    assert not same_bits(weights(tmp_path, 3), weights(tmp_path, 4)), "training continued"
    assert results["skipped_steps"] == [3]
    assert all(torch.isfinite(t).all() for t in weights(tmp_path, 4).values())
    assert sorted(logged(tmp_path, "loss")) == [1, 2, 4], "a skipped step has no loss"
    assert sorted(logged(tmp_path, "samples")) == [1, 2, 3, 4], "but its samples are counted"


def test_a_step_with_nan_gradient_is_skipped_too(tmp_path: Path, images: Path) -> None:
    config = tiny(tmp_path, images, steps=4, checkpoint_every=1, keep_checkpoints=9)
    assert run(config, poison_gradient=(2,)).results["skipped_steps"] == [3]
    assert same_bits(weights(tmp_path, 2), weights(tmp_path, 3))
    with safe_open(next((tmp_path / "nonfinite").iterdir()), "pt") as file:
        facts = json.loads(file.metadata()["localign"])
    assert math.isfinite(float(facts["loss"]))
    assert facts["grad_norm"] == "nan"


def test_the_batch_of_a_poisoned_step_can_be_replayed(tmp_path: Path, images: Path) -> None:
    config = tiny(tmp_path, images, steps=4, micro_batch=4)
    run(config, poison=(2,))
    files = sorted((tmp_path / "nonfinite").iterdir())
    assert [f.name for f in files] == [f"step-0000003-rank-0-batch-{i}.safetensors" for i in range(2)]
    kept = [load_file(f) for f in files]
    task = DisturbedAlignment(config)
    plan = BatchPlan(config.seed, 8, 4, 0, 1, 0, 2, 3, False)
    for batch, tensors in zip(task.batches(plan), kept, strict=True):
        assert torch.equal(batch.images, tensors["images"])
        assert torch.equal(batch.positions, tensors["positions"])
        assert torch.equal(batch.indices, tensors["indices"])
        replayed = Batch(tensors["images"], tensors["positions"], tensors["indices"], ())
        assert torch.isfinite(task.step(task.module, replayed).loss_sum)
    with safe_open(files[0], "pt") as file:
        assert json.loads(file.metadata()["localign"])["loss"] == "nan"


def test_three_in_a_row_end_the_run_with_one_line(tmp_path: Path, images: Path) -> None:
    with pytest.raises(RunFailure, match=r"3 steps in a row \(last: step 6, loss nan") as caught:
        run(tiny(tmp_path, images), poison=(3, 4, 5))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "nonfinite") in str(caught.value)
    assert max(e["step"] for e in read_log(tmp_path)) == 5


def test_two_and_two_do_not_end_the_run(tmp_path: Path, images: Path) -> None:
    assert run(tiny(tmp_path, images), poison=(2, 3, 5, 6)).results["skipped_steps"] == [3, 4, 6, 7]


def test_the_count_survives_a_resume(tmp_path: Path, images: Path) -> None:
    poison = (2, 3, 4)
    config = tiny(tmp_path, images, checkpoint_every=4)
    run_until(config, 4, poison=poison)
    # Two in a row lie before the checkpoint; the third comes after it.
    with pytest.raises(RunFailure, match="3 steps in a row"):
        run(replace(config, resume="must"), poison=poison)


def test_metrics_of_a_skipped_step_are_not_averaged(tmp_path: Path, images: Path) -> None:
    class Measuring(DisturbedAlignment):
        def step(self, model: torch.nn.Module, batch: Batch) -> StepResult:
            result = super().step(model, batch)
            result.metrics = {"m": (result.loss_sum.detach(), result.weight)}
            return result

    config = tiny(tmp_path, images, steps=4, log_every=2)
    train(Measuring(config, poison=(2,)), config, COMMAND)
    assert sorted(logged(tmp_path, "m")) == [2, 4]
    assert all(math.isfinite(value) for value in logged(tmp_path, "m").values())
