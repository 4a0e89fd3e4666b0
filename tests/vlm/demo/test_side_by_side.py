"""Runs side by side give the results that they give alone; one run's failure stops all runs and is reported."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from engine_runs import make_images, run, tiny
from safetensors.torch import load_file

from localign.engine.log import read_log
from localign.errors import RunFailure, RunStopped
from localign.vlm.demo.side_by_side import Job, available_cores, run_side_by_side


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 16)


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = out.glob("checkpoints/*8/model.safetensors")
    return load_file(file)


def job(out: Path, images: Path, **options: object) -> Job:
    return Job("align", tiny(out, images, resume="auto", **options))


@pytest.mark.slow
def test_runs_side_by_side_equal_runs_alone(images: Path, tmp_path: Path) -> None:
    jobs = [job(tmp_path / f"seed{seed}", images, seed=seed) for seed in range(3)]
    run_side_by_side(jobs, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, available_cores() // 2))
    for seed, finished in enumerate(jobs):
        run(tiny(tmp_path / f"alone{seed}", images, seed=seed))
        ours, theirs = weights(finished.folder), weights(tmp_path / f"alone{seed}")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert finished.output.is_file()
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_failed_run_is_named_with_its_error_and_the_others_save(images: Path, tmp_path: Path) -> None:
    long = job(tmp_path / "long", images, steps=100_000, checkpoint_every=100_000)
    bad = job(tmp_path / "bad", tmp_path / "nothing-here")
    with pytest.raises(RunFailure, match=r"bad failed: localign: .*nothing-here.*bad\.output\.txt"):
        run_side_by_side([long, bad], 2)
    states = [json.loads(path.read_text()) for path in long.folder.glob("checkpoints/*/state.json")]
    # The run may have been stopped before its first step; otherwise the checkpoint is of its last step.
    assert [state["step"] for state in states] == [e["step"] for e in read_log(long.folder)][-1:]


@pytest.mark.slow
def test_a_signal_stops_all_runs_and_the_same_call_resumes_them(images: Path, tmp_path: Path) -> None:
    jobs = [job(tmp_path / f"seed{seed}", images, seed=seed, steps=400, log_every=1) for seed in range(2)]

    def signalled() -> None:
        while not all(len(read_log(one.folder)) > 3 for one in jobs):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signalled, daemon=True).start()
    with pytest.raises(RunStopped, match="SIGTERM"):
        run_side_by_side(jobs, 2)
    reached = [len(read_log(one.folder)) for one in jobs]
    assert all(3 < steps < 400 for steps in reached)
    run_side_by_side(jobs, 2)
    for one in jobs:
        assert [entry["step"] for entry in read_log(one.folder) if "samples" in entry] == list(range(1, 401))
