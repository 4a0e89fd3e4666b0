"""A resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import DisturbedAlignment, logged, run, run_until, same_bits, tiny, weights

from localign.alignment import AlignTask
from localign.engine.batch import sample_digest
from localign.engine.distributed import DistributedContext
from localign.engine.log import LOG_FILE, read_log
from localign.engine.task import BatchPlan

STEPS = 8


def options(val: Path) -> dict[str, Any]:
    return {"steps": STEPS, "val": str(val), "val_every": 3, "ema_decay": 0.9, "keep_checkpoints": 1}


def interrupt(out: Path, images: Path, at: tuple[int, ...], **values: Any) -> dict[str, Any]:
    """Do a run that stops before each of the given steps and is resumed. Returns its results."""
    config = tiny(out, images, **values)
    for step in at:
        run_until(config, step)
        config = replace(config, resume="must")
    return run(config).results


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, images: Path, val: Path) -> Path:
    """An uninterrupted run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("reference") / "run"
    run(tiny(out, images, **options(val)))
    torch.set_num_threads(before)
    return out


@pytest.mark.parametrize("at", [(5,), (3, 5, 7), (1,), (4, 4)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    reference: Path, tmp_path: Path, images: Path, val: Path, at: tuple[int, ...]
) -> None:
    results = interrupt(tmp_path / "run", images, at, **options(val))
    expected = json.loads((reference / "results.json").read_text())
    for file in ("model", "optimizer", "ema"):
        resumed, uninterrupted = (
            weights(p, STEPS, f"{file}.safetensors") for p in (tmp_path / "run", reference)
        )
        assert same_bits(resumed, uninterrupted), file
    for field in ("samples", "loss", "grad_norm", "lr", "val_loss"):
        assert logged(tmp_path / "run", field) == logged(reference, field), field
    for field in ("steps", "samples_digest", "final", "best", "target_scale", "skipped_steps"):
        assert results[field] == expected[field], field
    exports = [(p / "export" / "model.safetensors").read_bytes() for p in (tmp_path / "run", reference)]
    assert exports[0] == exports[1]


def test_muon_with_adamw_resumes_exactly(tmp_path: Path, images: Path) -> None:
    run(tiny(tmp_path / "reference", images, optimizer="muon"))
    interrupt(tmp_path / "run", images, (3, 5), optimizer="muon")
    for file in ("model.safetensors", "optimizer.safetensors"):
        resumed, uninterrupted = (weights(tmp_path / name, 8, file) for name in ("run", "reference"))
        assert same_bits(resumed, uninterrupted), file
    kinds = {name.split(".", 1)[0] for name in resumed}
    assert kinds == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}


def test_the_target_scale_is_restored_not_estimated_again(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, images)
    run_until(config, 3)
    state_file = tmp_path / "checkpoints" / "step-0000002" / "state.json"
    scale = json.loads(state_file.read_text())["task"]["target_scale"]

    def on_train_start(self: AlignTask, context: DistributedContext, plan: BatchPlan) -> None:
        raise AssertionError("a continued run estimated its target scale")

    monkeypatch.setattr(AlignTask, "on_train_start", on_train_start)
    assert run(replace(config, resume="must")).results["target_scale"] == scale
    assert scale not in (0.0, 1.0)


def test_drop_path_resumes_exactly(tmp_path: Path, images: Path) -> None:
    kwargs = {**tiny(tmp_path, images).model_kwargs, "drop_path_rate": 0.5}
    run(tiny(tmp_path / "a", images, model_kwargs=kwargs))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    interrupt(tmp_path / "b", images, (5,), model_kwargs=kwargs)
    assert same_bits(weights(tmp_path / "a", STEPS), weights(tmp_path / "b", STEPS))
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator has changed"
    run(tiny(tmp_path / "plain", images))
    assert not same_bits(weights(tmp_path / "a", STEPS), weights(tmp_path / "plain", STEPS))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, images: Path, val: Path) -> None:
    config = tiny(tmp_path, images, **options(val))
    first = run(config).results
    log, saved = (tmp_path / LOG_FILE).read_text(), weights(tmp_path, STEPS)
    again = run(replace(config, resume="must")).results
    assert (tmp_path / LOG_FILE).read_text() == log
    assert same_bits(weights(tmp_path, STEPS), saved)
    assert {**again, "config": 0, "versions": 0} == {**first, "config": 0, "versions": 0}


def test_resume_auto_starts_or_resumes(tmp_path: Path, images: Path) -> None:
    config = tiny(tmp_path, images, resume="auto")
    run_until(config, 1)  # before the first checkpoint
    assert [e["step"] for e in read_log(tmp_path)] == [1]
    run_until(config, 5)
    run(config)
    assert sorted(logged(tmp_path, "samples")) == list(range(1, STEPS + 1))


def test_workers_and_micro_batches_may_change(
    reference: Path, tmp_path: Path, images: Path, val: Path
) -> None:
    config = tiny(tmp_path, images, workers=1, **options(val))
    run_until(config, 5)
    run(replace(config, resume="must", workers=0))
    assert same_bits(weights(tmp_path, STEPS), weights(reference, STEPS))
    assert logged(tmp_path, "samples") == logged(reference, "samples")


def test_a_log_line_cut_off_by_a_kill_is_deleted(
    reference: Path, tmp_path: Path, images: Path, val: Path
) -> None:
    config = tiny(tmp_path, images, **options(val))
    run_until(config, 5)
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 5, "lo')
    run(replace(config, resume="must"))
    assert logged(tmp_path, "samples") == logged(reference, "samples")


def test_the_average_resumes_exactly_after_skipped_steps(tmp_path: Path, images: Path) -> None:
    # The average copies the weights after the first step that is not skipped.
    poison = (0, 1)
    run(tiny(tmp_path / "a", images, ema_decay=0.5), poison=poison)
    config = tiny(tmp_path / "b", images, ema_decay=0.5)
    run_until(config, 2, poison=poison)
    run(replace(config, resume="must"), poison=poison)
    ema = [weights(tmp_path / name, STEPS, "ema.safetensors") for name in "ab"]
    assert same_bits(*ema)


def test_the_digest_depends_on_order(images: Path, tmp_path: Path) -> None:
    # Otherwise equal digests would prove nothing.
    task = DisturbedAlignment(tiny(tmp_path, images))
    plan = BatchPlan(0, 8, 8, 0, 1, 0, 0, 1, False)
    batch = next(iter(task.batches(plan)))
    swapped = batch._replace(indices=batch.indices.flip(0))
    assert sample_digest(batch) != sample_digest(swapped)
    both = [
        batch._replace(positions=batch.positions[s], indices=batch.indices[s])
        for s in (slice(5), slice(5, 8))
    ]
    assert sum(sample_digest(b) for b in both) % 2**64 == sample_digest(batch)
