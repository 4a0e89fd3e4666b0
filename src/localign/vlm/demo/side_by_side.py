"""Several training runs at a time on one machine, each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from localign.engine import run_folder
from localign.engine.log import say
from localign.errors import RunFailure, RunStopped
from localign.files import replace_text
from localign.options.train import TrainConfig
from localign.signals import stop_requests

OUTPUT_SUFFIX, CONFIG_SUFFIX = ".output.txt", ".yaml"
"""Endings of the files beside a run folder with the process's output and options."""
_POLL_SECONDS = 0.2
"""Time between two polls of the processes."""
_GRACE_SECONDS = 60.0
"""Time that stopped runs have to save a checkpoint."""


@dataclass(frozen=True)
class Job:
    """One training run: a command, for example ``vlm train``, and its options, with ``resume="auto"``."""

    command: str
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out)

    @property
    def output(self) -> Path:
        """The file that receives the process's output."""
        return self.folder.with_name(self.folder.name + OUTPUT_SUFFIX)


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_side_by_side(jobs: Sequence[Job], at_once: int) -> None:
    """Run all jobs, at most ``at_once`` at a time, which share the CPU cores.

    SIGTERM and SIGUSR1 stop all runs, each with a checkpoint.

    Raises:
        RunFailure: A run failed. The other runs are stopped first, and the error quotes the run's last output line.
        RunStopped: SIGTERM or SIGUSR1 was received.
    """
    waiting, running = list(jobs), list[tuple[Job, subprocess.Popen[bytes]]]()
    threads = max(1, available_cores() // at_once)
    with stop_requests() as stop:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running.append((job, _start(job, threads)))
                    say(f"{job.folder.name}: training; output in {job.output}")
                ended = [(job, process) for job, process in running if process.poll() is not None]
                running = [(job, process) for job, process in running if process.returncode is None]
                for job, process in ended:
                    _check(job, process.returncode)
                    say(f"{job.folder.name}: trained")
                if stop.made:
                    raise RunStopped(f"{stop.by}: stopped; the same command resumes from here")
                time.sleep(_POLL_SECONDS)
        finally:
            _stop([process for _, process in running])


def _start(job: Job, threads: int) -> subprocess.Popen[bytes]:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    path = job.folder.with_name(job.folder.name + CONFIG_SUFFIX)
    replace_text(path, yaml.safe_dump(run_folder.to_dict(job.config), sort_keys=False, allow_unicode=True))
    command = [sys.executable, "-m", "localign", *job.command.split(), "--config", str(path)]
    with job.output.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # so that Ctrl-C reaches the runs only through _stop
        )


def _check(job: Job, status: int) -> None:
    if status == 0 and (job.folder / run_folder.RESULTS_FILE).is_file():
        return
    lines = job.output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else f"exit status {status}"
    raise RunFailure(f"{job.folder.name} failed: {last} (full output in {job.output})")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the processes to save a checkpoint and end; kill any that do not end in time."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
