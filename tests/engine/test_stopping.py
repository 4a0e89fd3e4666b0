"""SIGTERM and SIGUSR1: the run saves a checkpoint and prints one line; a resume equals an unstopped run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from engine_runs import (
    COMMAND,
    DisturbedAlignment,
    family,
    last_step,
    launch,
    logged,
    run,
    run_until,
    same_bits,
    tiny,
    weights,
)
from torch import nn

from localign.alignment import AlignConfig
from localign.cli import EXIT_OK, exit_code, main
from localign.data.workers import _start_worker
from localign.engine import run_folder, train
from localign.errors import RunStopped
from localign.signals import SIGNALS, exit_on_signals, stop_requests

STEPS = 8


class SignalledAlignment(DisturbedAlignment):
    """An alignment that receives signals during steps (from 0; -1: during validation)."""

    signals: dict[int, tuple[signal.Signals, ...]]

    def step(self, model: nn.Module, batch: Any) -> Any:
        for number in self.signals.get(int(batch.positions[0]) // self.config.batch_size, ()):
            os.kill(os.getpid(), number)
        return super().step(model, batch)

    def validate(self, module: nn.Module, context: Any) -> dict[str, float]:
        for number in self.signals.get(-1, ()):
            os.kill(os.getpid(), number)
        return super().validate(module, context)


def run_with_signals(config: AlignConfig, signals: dict[int, tuple[signal.Signals, ...]]) -> None:
    task = SignalledAlignment(config)
    task.signals = signals
    train(task, config, COMMAND)


@pytest.fixture
def unstopped(tmp_path: Path, images: Path, val: Path) -> Path:
    """A run that is not stopped."""
    run(tiny(tmp_path / "unstopped", images, val=str(val), val_every=3))
    return tmp_path / "unstopped"


def raise_keyboard_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def check_equal(out: Path, unstopped: Path) -> None:
    for file in ("model", "optimizer"):
        assert same_bits(*(weights(p, STEPS, f"{file}.safetensors") for p in (out, unstopped))), file
    for field in ("samples", "loss", "val_loss"):
        assert logged(out, field) == logged(unstopped, field), field


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_stops_after_the_step_and_can_be_resumed(
    tmp_path: Path, images: Path, val: Path, unstopped: Path, number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # After steps 3 and 6 a validation is due, which is postponed. After the last step the run would end.
    config = tiny(tmp_path / "run", images, val=str(val), val_every=3, checkpoint_every=100, resume="auto")
    for step in (2, 4, 5, STEPS - 1):
        with pytest.raises(RunStopped, match=f"{number.name}: stopped after step {step + 1} of {STEPS}"):
            run_with_signals(
                config, {step: (number, number)}
            )  # the launcher and the scheduler may both send one
        assert last_step(Path(config.out)) == step + 1
        assert not (tmp_path / "run" / "results.json").exists()
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(":")[0] for line in lines if "val_loss" not in line] == [number.name]
    run(config)
    check_equal(tmp_path / "run", unstopped)


def test_a_signal_while_validating(tmp_path: Path, images: Path, val: Path, unstopped: Path) -> None:
    config = tiny(tmp_path / "run", images, val=str(val), val_every=3, resume="auto")
    with pytest.raises(RunStopped, match="stopped after step 4"):
        run_with_signals(config, {-1: (signal.SIGTERM,)})
    run(config)
    check_equal(tmp_path / "run", unstopped)


def test_a_postponed_validation_is_logged_once(
    tmp_path: Path, images: Path, val: Path, unstopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "run", images, val=str(val), val_every=3, checkpoint_every=100, resume="auto")
    with pytest.raises(RunStopped):
        run_with_signals(config, {2: (signal.SIGTERM,)})  # the validation after step 3 is postponed
    run_until(config, 4)  # validates, but writes no checkpoint afterwards
    run_until(config, 5)
    with pytest.raises(RunStopped):
        run_with_signals(config, {STEPS - 1: (signal.SIGTERM,)})  # the same for the last step
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_results", raise_keyboard_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    run(config)
    check_equal(tmp_path / "run", unstopped)


def test_the_command_exits_with_0(tmp_path: Path, images: Path) -> None:
    config = tiny(tmp_path / "run", images)
    assert exit_code(lambda: run_with_signals(config, {3: (signal.SIGTERM,)})) == EXIT_OK


SLOW_TO_BUILD = """
import os, sys, time
from localign import cli
def run(command, config):
    print("building", flush=True)
    time.sleep(60)
cli.Command.run = run
sys.exit(cli.main(["list"]))
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_before_training_the_process_ends_with_a_line(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_BUILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"building\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert errors.decode() == f"localign: ended by {number.name}\n"
    assert process.returncode == 128 + number


def test_a_worker_of_a_command_ends_without_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    forking = multiprocessing.get_context("fork")
    with exit_on_signals():
        started = forking.Event()

        def wait() -> None:
            started.set()
            time.sleep(60)

        worker = forking.Process(target=wait)
        worker.start()
        assert started.wait(30)
        worker.terminate()
        worker.join(30)
    assert worker.exitcode == -signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_signal_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_requests() as request:
        assert not request.made
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.by == "SIGUSR1"
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert main(["--version"]) == main(["list"]) == EXIT_OK
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_other_threads_get_no_requests() -> None:
    seen: list[bool] = []

    def in_thread() -> None:
        with stop_requests() as request:
            seen.append(request.made)

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == [False]


def test_loader_workers_leave_signals_to_the_main_process() -> None:
    numbers = (*SIGNALS, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        _start_worker(0)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds a run's processes through /proc")
@pytest.mark.parametrize(("ranks", "target"), [(1, "all"), (2, "ranks"), (2, "launcher")])
def test_signals_to_processes(tmp_path: Path, images: Path, ranks: int, target: str) -> None:
    """Schedulers may signal every process of a job; torchrun forwards the signals that it gets."""
    config = tiny(tmp_path, images, steps=400, checkpoint_every=1000, workers=1, resume="auto")
    process = launch(ranks, asdict(config), sleep=0.05)
    while last_step(tmp_path) < 3:
        assert process.poll() is None
    processes = family(process.pid)
    for pid in {"all": processes, "ranks": processes[1:], "launcher": processes[:1]}[target]:
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    # torchrun exits with an error whenever a signal ends it, even if all ranks exit with 0.
    assert process.returncode == (1 if target == "launcher" else 0), output.decode()
    lines = [line for line in output.decode().splitlines() if "stopped after step" in line]
    assert len(lines) == 1, output.decode()
    step = last_step(tmp_path)
    assert f"stopped after step {step} of 400" in lines[0]
    assert weights(tmp_path, step)
    assert b"ChildFailedError" not in output
