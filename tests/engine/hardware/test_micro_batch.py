"""`--micro-batch auto`: the size that is found fits, and results do not depend on it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import (
    TINY_VIT,
    DisturbedAlignment,
    logged,
    max_difference,
    run,
    run_until,
    same_bits,
    tiny,
    weights,
)
from rank_forks import on_ranks
from torch import nn

from localign.alignment import AlignConfig
from localign.data.loader import Batch
from localign.engine import StepResult, train
from localign.engine.hardware import memory, microbatch
from localign.engine.hardware.memory import available, check_measurable
from localign.engine.run_folder import read_results
from localign.errors import UserError

STEPS = 8
EPS = 1e-5
"""Larger than the rounding of sums, as in test_ranks.py."""

DROPPING = {**TINY_VIT, "proj_drop_rate": 0.1}

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="main memory is measured on Linux only"
)


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """The search collects garbage after every trial. Leave out what this process imported, which takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class SizeRecorder(DisturbedAlignment):
    """An alignment that records the size of every micro-batch, also during the search."""

    def __init__(self, config: AlignConfig, **disturbances: Any) -> None:
        super().__init__(config, **disturbances)
        self.sizes: list[int] = []

    def step(self, model: nn.Module, batch: Batch) -> StepResult:
        self.sizes.append(len(batch.positions))
        return super().step(model, batch)


def sizes_of(config: AlignConfig, **disturbances: Any) -> list[int]:
    task = SizeRecorder(config, **disturbances)
    train(task, config, "align")
    return task.sizes


@pytest.mark.parametrize(
    ("batch_size", "room", "found"),
    [(8, 8, 8), (8, 7, 4), (8, 3, 2), (8, 1, 1), (12, 5, 4), (12, 11, 6), (7, 6, 1)],
)
def test_the_largest_size_that_fits_and_divides_is_found(
    tmp_path: Path, images: Path, batch_size: int, room: int, found: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path, images, micro_batch="auto", batch_size=batch_size, steps=3)
    sizes = sizes_of(config, room=(room,))
    assert sizes[-3 * batch_size // found :] == [found] * (3 * batch_size // found)
    assert logged(tmp_path, "micro_batch") == {0: found}
    assert read_results(tmp_path)["micro_batch"] == found
    assert read_results(tmp_path)["config"]["micro_batch"] == "auto"
    assert f"micro-batch: {found} of the {batch_size} samples per rank and step" in capsys.readouterr().err


def test_the_search_does_not_change_the_run(tmp_path: Path, images: Path, val: Path) -> None:
    values: dict[str, Any] = {"val": str(val), "val_every": 3, "ema_decay": 0.9, "model_kwargs": DROPPING}
    run(tiny(tmp_path / "given", images, micro_batch=2, **values))
    run(tiny(tmp_path / "found", images, micro_batch="auto", **values), room=(2,))
    for field in ("samples", "loss", "grad_norm", "val_loss"):
        assert logged(tmp_path / "given", field) == logged(tmp_path / "found", field), field
    for file in ("model", "ema", "optimizer"):
        a, b = (weights(tmp_path / name, STEPS, f"{file}.safetensors") for name in ("given", "found"))
        assert same_bits(a, b), file


def test_a_resumed_run_searches_again_and_gets_the_same_weights(tmp_path: Path, images: Path) -> None:
    run(tiny(tmp_path / "full", images, eps=EPS))
    config = tiny(tmp_path / "run", images, eps=EPS, micro_batch="auto")
    with pytest.raises(UserError, match="not even a micro-batch of 1 fits"):
        run(config, room=(0,))
    resumed = replace(config, resume="must")
    run_until(resumed, 5, room=(4,))
    run(resumed, room=(2,))
    assert logged(tmp_path / "run", "micro_batch") == {0: 4, 4: 2}
    assert logged(tmp_path / "run", "samples") == logged(tmp_path / "full", "samples")
    assert max_difference(weights(tmp_path / "run", STEPS), weights(tmp_path / "full", STEPS)) < 1e-5


def test_mixed_pairs_stay_in_one_micro_batch(tmp_path: Path, images: Path) -> None:
    config = tiny(tmp_path, images, micro_batch="auto", mixup=0.5, steps=3, batch_size=12)
    assert set(sizes_of(config, room=(5,))) == {2, 4, 6}


class FakeMeter:
    """A meter with 100 bytes of memory, of which use grows linearly with samples."""

    budget = 100

    def __init__(self, task: SizeRecorder, least: int, growth: int) -> None:
        self.task, self.least, self.growth = task, least, growth

    def restart(self) -> None: ...

    def peak(self) -> int:
        return self.least + self.growth * self.task.sizes[-1]


@pytest.mark.parametrize(
    ("growth", "found", "tried"),
    [(1, 16, [1, 2, 4, 8, 16]), (7, 8, [1, 2, 4, 8]), (40, 1, [1, 2]), (70, 0, [1])],
)
def test_a_cpu_never_tries_a_size_that_will_not_fit(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, growth: int, found: int, tried: list[int]
) -> None:
    config = tiny(tmp_path, images, micro_batch="auto", batch_size=16, steps=3)
    task = SizeRecorder(config)
    monkeypatch.setattr(microbatch, "meter", lambda context: FakeMeter(task, 40, growth))
    if found:
        train(task, config, "align")
        assert read_results(tmp_path)["micro_batch"] == found
    else:
        with pytest.raises(UserError, match="not even a micro-batch of 1 fits in the memory of cpu"):
            train(task, config, "align")
    in_search = task.sizes[: -3 * 16 // found] if found else task.sizes
    assert sorted(set(in_search)) == tried


def test_resident_memory_is_measured() -> None:
    memory_meter = memory.ProcessMeter(1)
    assert 0 < memory_meter.budget - memory._status("VmRSS") <= available()
    memory_meter.restart()
    before = memory_meter.peak()
    block = torch.ones(32 << 18)  # 32 MiB
    assert 30 << 20 < memory_meter.peak() - before < 40 << 20
    del block
    memory_meter.restart()
    assert memory_meter.peak() - before < 8 << 20
    assert memory.ProcessMeter(4).budget < memory_meter.budget


def test_limits_of_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "self" / "cgroup").write_text("0::/job/step\n")
    root = tmp_path / "groups"
    (root / "job" / "step").mkdir(parents=True)
    for folder, limit, used, cached in (
        (root / "job", "5000000", 2000000, 500000),
        (root / "job/step", "max", 0, 0),
    ):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(memory, "_CGROUPS", root)
    assert available() == 3_500_000
    (tmp_path / "self" / "cgroup").write_text("4:cpu,memory:/job\n0::/elsewhere\n")
    assert available() == 8000 * 1024
    for name, value in (("max", "700"), ("current", "600"), ("stat", "inactive_file 50")):
        (root / f"memory.{name}").write_text(f"{value}\n")
    assert available() == 150, "a container sees its own group as the root"
    (tmp_path / "self" / "cgroup").write_text("4:cpu,memory:/job\n")
    assert available() == 150


def test_memory_that_cannot_be_measured_is_refused(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="not of mps here; give a number"):
        check_measurable(tiny(tmp_path, images, micro_batch="auto"), torch.device("mps"))
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    with pytest.raises(UserError, match="not of cpu here; give a number"):
        run(tiny(tmp_path / "run", images, micro_batch="auto"))
    assert not (tmp_path / "run").exists()


def test_ranks_agree_on_a_size_that_fits_on_all(tmp_path: Path, images: Path, val: Path) -> None:
    values: dict[str, Any] = {"eps": EPS, "val": str(val), "ema_decay": 0.9, "batch_size": 16}
    run(tiny(tmp_path / "one", images, **values))
    end = on_ranks(2, run, tiny(tmp_path / "two", images, micro_batch="auto", **values), room=(8, 3))
    assert end.codes == [0, 0], end.output
    assert read_results(tmp_path / "two")["micro_batch"] == 2
    assert logged(tmp_path / "one", "samples") == logged(tmp_path / "two", "samples")
    assert max_difference(weights(tmp_path / "one", STEPS), weights(tmp_path / "two", STEPS)) < 1e-5


def test_the_error_is_printed_once_if_no_size_fits(tmp_path: Path, images: Path) -> None:
    end = on_ranks(2, run, tiny(tmp_path, images, micro_batch="auto"), room=(8, 0))
    assert end.codes == [2, 2], end.output
    assert end.output.count("not even a micro-batch of 1 fits") == 1, end.output
