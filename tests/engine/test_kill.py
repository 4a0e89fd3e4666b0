"""The acceptance test of the loop: ten kills (-9) at random times, with several ranks and loader workers.

After each kill the run is resumed; the last part runs to the end. The weights must equal those of an uninterrupted run.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from engine_runs import (
    kill_all,
    last_step,
    launch,
    logged,
    max_difference,
    run,
    run_ranks,
    same_bits,
    tiny,
    weights,
)

from localign.alignment import AlignConfig

STEPS = 60
SLEEP = 0.03
"""Seconds added to each step, so that kills hit the run."""
TOLERANCE = 1e-5
FILES = ("model.safetensors", "ema.safetensors")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds a run's processes through /proc"),
]


def options(out: Path, images: Path, val: Path, workers: int = 0) -> dict[str, Any]:
    # Adam makes full steps of gradients that are zero up to rounding, such as those of attention's key biases.
    # An eps larger than the rounding prevents that.
    config = tiny(
        out, images, steps=STEPS, val=str(val), val_every=20, ema_decay=0.9, eps=1e-5, log_every=1,
        checkpoint_every=2, resume="auto", workers=workers,
    )  # fmt: skip
    return asdict(config)


def kill_during(ranks: int, config: dict[str, Any], draw: random.Random, early: bool) -> int:
    """Start or resume a run and kill it at a random time.

    Args:
        ranks: Number of processes.
        config: Options of the run.
        draw: Draws the time.
        early: Kill at any time after the launch; else only after this part has taken a step.

    Returns:
        The last step in the log.
    """
    out = Path(config["out"])
    process = launch(ranks, config, sleep=SLEEP)
    if early:
        time.sleep(draw.uniform(0.0, 3.5))
    else:
        began = last_step(out)
        deadline = time.monotonic() + 60
        while last_step(out) in (0, began) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.5))
    alive = process.poll() is None
    kill_all(process)
    assert alive, "the run ended before it could be killed"
    return last_step(out)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, images: Path, val: Path) -> Path:
    """The uninterrupted run on one rank."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_ranks(1, options(out, images, val))
    return out


@pytest.fixture(scope="module")
def uninterrupted_on_two(tmp_path_factory: pytest.TempPathFactory, images: Path, val: Path) -> Path:
    """The uninterrupted run on two ranks."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_ranks(2, options(out, images, val))
    return out


def killed_run(out: Path, images: Path, val: Path, parts: list[tuple[int, int]], seed: int) -> None:
    """Do a run in parts of (ranks, workers). All parts but the last are killed."""
    draw = random.Random(seed)
    for number, (ranks, workers) in enumerate(parts[:-1]):
        step = kill_during(ranks, options(out, images, val, workers), draw, early=number == 1)
        assert step < STEPS, "the run ended before it could be killed; make its steps slower"
    ranks, workers = parts[-1]
    run_ranks(ranks, options(out, images, val, workers))


def check_log(out: Path, expected: Path) -> None:
    """Every step is logged once, with the same samples."""
    assert sorted(logged(out, "samples")) == list(range(1, STEPS + 1))
    assert logged(out, "samples") == logged(expected, "samples")
    assert sorted(logged(out, "val_loss")) == [20, 40, 60]
    assert not list(out.rglob(".*.tmp"))


def test_four_kills_on_one_rank(tmp_path: Path, images: Path, val: Path, uninterrupted: Path) -> None:
    killed_run(tmp_path, images, val, [(1, 0), (1, 2), (1, 2), (1, 0), (1, 2)], seed=1)
    check_log(tmp_path, uninterrupted)
    for file in FILES:
        assert same_bits(weights(tmp_path, STEPS, file), weights(uninterrupted, STEPS, file)), file
    for field in ("loss", "val_loss"):
        assert logged(tmp_path, field) == logged(uninterrupted, field)


def test_two_kills_on_two_ranks(
    tmp_path: Path, images: Path, val: Path, uninterrupted: Path, uninterrupted_on_two: Path
) -> None:
    killed_run(tmp_path, images, val, [(2, 2), (2, 0), (2, 2)], seed=2)
    check_log(tmp_path, uninterrupted)
    for file in FILES:
        assert same_bits(weights(tmp_path, STEPS, file), weights(uninterrupted_on_two, STEPS, file)), file
        assert (
            max_difference(weights(tmp_path, STEPS, file), weights(uninterrupted, STEPS, file)) < TOLERANCE
        ), file


def test_four_kills_with_changing_numbers_of_ranks(
    tmp_path: Path, images: Path, val: Path, uninterrupted: Path
) -> None:
    killed_run(tmp_path, images, val, [(1, 2), (2, 0), (1, 0), (2, 2), (1, 0)], seed=3)
    check_log(tmp_path, uninterrupted)
    for file in FILES:
        assert (
            max_difference(weights(tmp_path, STEPS, file), weights(uninterrupted, STEPS, file)) < TOLERANCE
        ), file
    assert logged(tmp_path, "loss") == pytest.approx(logged(uninterrupted, "loss"), abs=TOLERANCE)


def test_an_uninterrupted_run_is_the_same_in_another_process(
    tmp_path: Path, images: Path, val: Path, uninterrupted: Path
) -> None:
    run(AlignConfig(**options(tmp_path, images, val)))
    assert same_bits(weights(tmp_path, STEPS), weights(uninterrupted, STEPS))
