"""Runs on several ranks without torchrun: the ranks are forks of one fresh process that has imported what they need."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from localign.cli import exit_code

PATIENCE = 300.0
"""Seconds until all ranks are killed."""
GRACE = 20.0
"""Seconds until the other ranks are killed after one has failed, as torchrun does."""


@dataclass(frozen=True)
class RanksEnd:
    """The end of a run on several ranks."""

    codes: list[int]
    """Exit code of each rank; negative if a signal ended it."""
    output: str
    """Standard output and error of all ranks."""
    seconds: float

    @property
    def lines(self) -> list[str]:
        """The error lines of localign."""
        return [line for line in self.output.splitlines() if line.startswith("localign: ")]


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any, **options: Any) -> RanksEnd:
    """Call a function of a module on every rank; an error in it ends the rank as it ends a command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    forks = multiprocessing.get_context("forkserver")  # not plain forks: this process may have threads
    forks.set_forkserver_preload(["localign.alignment", "localign.cli", "safetensors.torch"])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        output.touch()
        ranks = [
            forks.Process(target=_rank, args=(rank, size, port, output, work, arguments, options))
            for rank in range(size)
        ]
        started = time.monotonic()
        for process in ranks:
            process.start()
        _wait(ranks)
        seconds = time.monotonic() - started
        codes = [process.exitcode or 0 for process in ranks]
        return RanksEnd(codes, output.read_text(errors="replace"), seconds)


def _wait(ranks: list[ForkServerProcess]) -> None:
    deadline = time.monotonic() + PATIENCE
    failed = False
    while any(process.is_alive() for process in ranks):
        if not failed and any(process.exitcode for process in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.01)


def _rank(
    rank: int,
    size: int,
    port: int,
    output: Path,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    with output.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()  # collecting what was imported before the fork takes long

    def command() -> None:
        work(*arguments, **options)

    sys.exit(exit_code(command))
