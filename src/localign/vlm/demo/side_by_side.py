"""Several training runs on one machine at a time, each a process of its own."""

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
"""Beside a run's folder: what its process said, and what it was told."""
_POLL = 0.2
"""Seconds between two looks at the processes."""
_GRACE = 60.0
"""Seconds that runs have to save when they are stopped."""


@dataclass(frozen=True)
class Job:
    """One run: the command that a user would give, and its options, with ``resume="auto"``."""

    command: str
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out)

    @property
    def output(self) -> Path:
        """What the process says."""
        return self.folder.with_name(self.folder.name + OUTPUT_SUFFIX)


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_side_by_side(jobs: Sequence[Job], at_once: int) -> None:
    """Train them all, ``at_once`` of them at any time, with the CPU's cores shared out among those.

    A signal that stops a run stops them all, each with a checkpoint.

    Raises:
        RunFailure: A run failed; the last line that it said. The others are stopped first.
        RunStopped: SIGTERM or SIGUSR1 came.
    """
    waiting, running = list(jobs), list[tuple[Job, subprocess.Popen[bytes]]]()
    threads = max(1, available_cores() // at_once)
    with stop_requests() as stop:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running.append((job, _started(job, threads)))
                    say(f"{job.folder.name}: training; it says how in {job.output}")
                ended = [(job, process) for job, process in running if process.poll() is not None]
                running = [(job, process) for job, process in running if process.returncode is None]
                for job, process in ended:
                    _check(job, process.returncode)
                    say(f"{job.folder.name}: trained")
                if stop.made:
                    raise RunStopped(f"{stop.by}: stopped; the same command goes on from here")
                time.sleep(_POLL)
        finally:
            _stop([process for _, process in running])


def _started(job: Job, threads: int) -> subprocess.Popen[bytes]:
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
            start_new_session=True,  # an interrupt at the terminal reaches them through _stop alone
        )


def _check(job: Job, status: int) -> None:
    if status == 0 and (job.folder / run_folder.RESULTS_FILE).is_file():
        return
    said = job.output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = said[-1] if said else f"it ended with status {status}"
    raise RunFailure(f"{job.folder.name} failed: {last} (all of it in {job.output})")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let them save and end; those that do not are killed."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
