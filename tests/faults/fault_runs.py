"""Tiny runs with faults. Each runs in processes forked from a server process that has imported everything.

As a program it is that server: it reads jobs, one JSON object per line, and answers each with exit codes and seconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_runs import COMMAND, DisturbedAlignment
from fault_kinds import Fault, install
from sharded_runs import TokenTask
from torch import nn

from localign.alignment import AlignConfig
from localign.cli import exit_code
from localign.engine import StepResult, TrainConfig, train

KILLED = -signal.SIGKILL


@dataclass
class Outcome:
    """The end of one part of a run."""

    codes: list[int]
    """Exit code of each rank; negative if a signal ended it."""
    seconds: float
    output: str
    """Standard output and error of all ranks."""
    lines: list[str] = field(init=False)
    """The error lines of localign."""

    def __post_init__(self) -> None:
        self.lines = [line for line in self.output.splitlines() if line.startswith("localign: ")]


class FaultyAlignment(DisturbedAlignment):
    """An alignment that calls ``at_step``."""

    at_step: Callable[[int], None]

    def step(self, model: nn.Module, batch: Any) -> StepResult:
        self.at_step(int(batch.positions[0]) // self.config.batch_size)
        return super().step(model, batch)


class FaultyTokens(TokenTask):
    """Next-token prediction that calls ``at_step``."""

    at_step: Callable[[int], None]

    def step(self, model: nn.Module, batch: Any) -> StepResult:
        self.at_step(int(batch.positions[0]) // self.config.batch_size)
        return super().step(model, batch)


def run_part(job: dict[str, Any]) -> None:
    """Do one part of a run in this process."""
    torch.set_num_threads(1)
    at_step = install([Fault(**fault) for fault in job["faults"]], Path(job["config"]["out"]))
    if job["other_host"]:
        change_host_and_clock()
    task: FaultyAlignment | FaultyTokens
    if job["tokens"]:
        task = FaultyTokens(TrainConfig(**job["config"]), **job["disturbances"])
    else:
        task = FaultyAlignment(AlignConfig(**job["config"]), **job["disturbances"])
    task.at_step = at_step
    train(task, task.config, "tokens" if job["tokens"] else COMMAND)


def change_host_and_clock() -> None:
    """Pretend to be on another host, in another time zone, ten years later."""
    if sys.version_info >= (3, 12):
        os.unshare(os.CLONE_NEWUTS)
        with suppress(OSError):
            socket.sethostname("another-host")
    os.environ["TZ"] = "Pacific/Kiritimati"
    time.tzset()
    now = time.time
    time.time = lambda: now() + 10 * 365 * 86400


def _child(job: dict[str, Any], rank: int, port: int, output: int) -> None:
    for stream in (1, 2):
        os.dup2(output, stream)
    if job["ranks"] > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(job["ranks"]),
        )  # fmt: skip
    code = 70
    try:
        code = exit_code(lambda: run_part(job))
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pids: list[int], patience: float) -> dict[int, int]:
    """Exit codes of processes. After ``patience`` seconds the remaining ones are killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + patience
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        left = set(pids) - codes.keys()
        # A launcher kills a hanging rank once the others have ended.
        if time.monotonic() > deadline or (codes and all(_is_stopped(pid) for pid in left)):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return codes


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def serve() -> None:
    """Do jobs until the end of standard input."""
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with open(job["output"], "wb") as output:
            started, pids = time.monotonic(), []
            for rank in range(job["ranks"]):
                pid = os.fork()
                if pid == 0:
                    _child(job, rank, port, output.fileno())
                pids.append(pid)
            codes = _wait(pids, job["patience"])
            seconds = time.monotonic() - started
        print(json.dumps({"codes": [codes[pid] for pid in pids], "seconds": seconds}), flush=True)


class Server:
    """The server process; see :func:`serve`."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output.txt"
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def do(
        self,
        config: AlignConfig | TrainConfig,
        *faults: Fault,
        ranks: int = 1,
        other_host: bool = False,
        patience: float = 120.0,
        **disturbances: Any,
    ) -> Outcome:
        """Do a part of a run, from its start or checkpoint to its end or a fault.

        Args:
            config: Options of the run.
            faults: Strike in order of their steps.
            ranks: Number of processes.
            other_host: Pretend to be on another host at another time.
            patience: Seconds after which processes are killed.
            disturbances: Options of the task.
        """
        job = {
            "config": asdict(config), "tokens": not isinstance(config, AlignConfig), "ranks": ranks,
            "faults": [asdict(fault) for fault in faults], "other_host": other_host, "disturbances": disturbances,
            "patience": patience, "output": str(self.output),
        }  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Outcome(answer["codes"], answer["seconds"], self.output.read_text(errors="replace"))


@contextmanager
def server(folder: Path) -> Iterator[Server]:
    """A server that runs inside the block."""
    started = Server(folder)
    try:
        yield started
    finally:
        assert started.process.stdin is not None
        started.process.stdin.close()
        started.process.wait()


if __name__ == "__main__":
    serve()
