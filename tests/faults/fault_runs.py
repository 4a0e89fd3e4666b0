"""Tiny runs to which faults happen, each in processes of its own that are forked from one that has all imported.

As a program it is that one: it reads jobs, one JSON object a line, and answers each with exit codes and output.
"""

from __future__ import annotations

import errno
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
from engine_runs import COMMAND, Meddled
from sharded_runs import TokenTask
from torch import nn

from localign import files
from localign.alignment import AlignConfig
from localign.cli import exit_code
from localign.engine import StepResult, TrainConfig, train
from localign.engine import checkpoint as checkpoints
from localign.engine import log as logs
from localign.engine import run as runs
from localign.engine import sharded_checkpoint as sharded

KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    kind: str
    """A key of one of the tables below."""
    step: int
    """The first step that it can happen in, counted from 0."""
    rank: int = 0
    """Whom it happens to."""


@dataclass
class Outcome:
    """How a part of a run ended."""

    codes: list[int]
    """Exit code of each rank; minus the signal that ended it."""
    seconds: float
    output: str
    """What all ranks wrote to standard output and error."""
    lines: list[str] = field(init=False)
    """The lines in which localign said why it ended."""

    def __post_init__(self) -> None:
        self.lines = [line for line in self.output.splitlines() if line.startswith("localign: ")]


class Now:
    """What this process does, for faults to know when they are due."""

    step = -1
    waiting: list[Fault] = []  # noqa: RUF012

    @classmethod
    def due(cls, kind: str) -> bool:
        """Whether a fault strikes here; once."""
        for fault in cls.waiting:
            if fault.kind == kind and fault.rank == my_rank() and cls.step >= fault.step:
                cls.waiting.remove(fault)
                return True
        return False


def my_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def send(number: int) -> Callable[[], None]:
    """A strike that sends a signal to this process."""
    return lambda: os.kill(os.getpid(), number)


def pause() -> None:
    """Stopped for a moment, as by a debugger or a full host."""
    subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_a_worker() -> None:
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


def fill_disk(out: Path) -> None:
    """The last byte of a small file system is taken, by somebody else's file."""
    with suppress(OSError), (out.parent / "ballast").open("wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 10, 1):
            with suppress(OSError):
                while True:
                    ballast.write(b"x" * size)


def make_read_only(out: Path) -> None:
    for options in (["--bind", out, out], ["-o", "remount,bind,ro", out]):
        subprocess.run(["mount", *map(str, options)], check=True)


def take_away(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))


def raising(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def no_writes(number: int) -> Callable[[], None]:
    """Nothing more can be written; for where no small file system can be had."""

    def strike() -> None:
        checkpoints.save_file = sharded.save_file = raising(number)  # type: ignore[assignment]
        files.fsync_path = sharded.fsync_path = raising(number)
        logs.JsonLines.write = raising(number)  # type: ignore[method-assign]

    return strike


def before(kind: str, owner: Any, name: str, strike: Callable[[Any], None]) -> None:
    """Let a fault that is due strike before a function does its work; it gets the function's first argument."""
    function = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        if Now.due(kind):
            strike(args[0] if args else None)
        return function(*args, **kwargs)

    setattr(owner, name, struck)


def half_a_file(number: int) -> Callable[[str], None]:
    """A signal while a checkpoint's tensors are half written."""

    def install(kind: str) -> None:
        for module in (checkpoints, sharded):
            save_file = module.save_file

            def struck(tensors: Any, path: Path, save: Any = save_file, **kwargs: Any) -> None:
                if Now.due(kind):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(b"half")
                    os.kill(os.getpid(), number)
                save(tensors, path, **kwargs)

            module.save_file = struck  # type: ignore[assignment]

    return install


def half_a_line(log: Any) -> None:
    log._file.write('{"step": 1')
    log._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def slow_disk() -> None:
    function = files.fsync_path

    def slow(path: Path) -> None:
        time.sleep(0.05)
        function(path)

    files.fsync_path = sharded.fsync_path = slow


def at(owner: Any, name: str, strike: Callable[[Any], None]) -> Callable[[str], None]:
    return lambda kind: before(kind, owner, name, strike)


def die(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


IN_A_STEP: dict[str, Callable[[], None]] = {
    "kill -9 in a step": send(signal.SIGKILL),
    "SIGTERM in a step": send(signal.SIGTERM),
    "SIGUSR1 in a step": send(signal.SIGUSR1),
    "SIGSTOP, SIGCONT": pause,
    "slow disk": slow_disk,
    "kill -9 of a loader worker": kill_a_worker,
    "disk full, simulated": no_writes(errno.ENOSPC),
    "disk read-only, simulated": no_writes(errno.EROFS),
    "a rank dies": send(signal.SIGKILL),
    "a rank hangs": send(signal.SIGSTOP),
}
ON_THE_DISK: dict[str, Callable[[Path], None]] = {
    "disk full": fill_disk,
    "disk read-only": make_read_only,
    "run folder gone": take_away,
}
"""In a step too; they take the run folder."""
ELSEWHERE: dict[str, Callable[[str], None]] = {
    "kill -9 while saving": half_a_file(signal.SIGKILL),
    "SIGTERM while saving": half_a_file(signal.SIGTERM),
    "kill -9 before a rename": at(files, "put_in_place", die),
    "kill -9 before old checkpoints go": at(checkpoints.Checkpoints, "_tidy", die),
    "kill -9 while logging": at(logs.JsonLines, "write", half_a_line),
    "kill -9 while exporting": at(runs, "write_results", die),
}
"""Installed before the run; they strike when the step was reached."""


def install(faults: list[Fault], out: Path) -> Callable[[int], None]:
    """Prepare faults; what is returned is to be called at each step."""
    Now.waiting, Now.step = faults, -1
    for fault in faults:
        if fault.kind in ELSEWHERE:
            ELSEWHERE[fault.kind](fault.kind)
            sharded.put_in_place = files.put_in_place

    def at_step(number: int) -> None:
        Now.step = number
        for kind in [fault.kind for fault in Now.waiting]:
            if kind not in ELSEWHERE and Now.due(kind):
                ON_THE_DISK[kind](out) if kind in ON_THE_DISK else IN_A_STEP[kind]()

    return at_step


class StruckAlignment(Meddled):
    """An alignment that calls ``at_step``."""

    at_step: Callable[[int], None]

    def step(self, model: nn.Module, batch: Any) -> StepResult:
        self.at_step(int(batch.positions[0]) // self.config.batch_size)
        return super().step(model, batch)


class StruckTokens(TokenTask):
    """Next-token prediction that calls ``at_step``."""

    at_step: Callable[[int], None]

    def step(self, model: nn.Module, batch: Any) -> StepResult:
        self.at_step(int(batch.positions[0]) // self.config.batch_size)
        return super().step(model, batch)


def run_part(job: dict[str, Any]) -> None:
    """One part of a run, in this process."""
    torch.set_num_threads(1)
    at_step = install([Fault(**fault) for fault in job["faults"]], Path(job["config"]["out"]))
    if job["elsewhere"]:
        live_elsewhere()
    task: StruckAlignment | StruckTokens
    if job["tokens"]:
        task = StruckTokens(TrainConfig(**job["config"]), **job["meddling"])
    else:
        task = StruckAlignment(AlignConfig(**job["config"]), **job["meddling"])
    task.at_step = at_step
    train(task, task.config, "tokens" if job["tokens"] else COMMAND)


def live_elsewhere() -> None:
    """On another host, in another time zone, ten years on."""
    os.unshare(os.CLONE_NEWUTS) if hasattr(os, "unshare") else None
    with suppress(OSError):
        if hasattr(os, "unshare"):
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
    """Exit codes of processes; those that are left when time is up are killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + patience
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        left = set(pids) - codes.keys()
        # A rank that hangs is the launcher's to kill, when the others have ended by themselves.
        if time.monotonic() > deadline or (codes and all(_is_stopped(pid) for pid in left)):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return codes


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def serve() -> None:
    """Do jobs until standard input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with open(job["output"], "wb") as output:
            began, pids = time.monotonic(), []
            for rank in range(job["ranks"]):
                pid = os.fork()
                if pid == 0:
                    _child(job, rank, port, output.fileno())
                pids.append(pid)
            codes = _wait(pids, job["patience"])
            seconds = time.monotonic() - began
        print(json.dumps({"codes": [codes[pid] for pid in pids], "seconds": seconds}), flush=True)


class Server:
    """The process that forks; see :func:`serve`."""

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
        elsewhere: bool = False,
        patience: float = 120.0,
        **meddling: Any,
    ) -> Outcome:
        """A part of a run, from its start or its checkpoint to its end or a fault.

        Args:
            config: Of the run.
            faults: What happens.
            ranks: Processes.
            elsewhere: On another host and at another time.
            patience: Seconds after which processes are killed.
            meddling: Of the task.
        """
        job = {
            "config": asdict(config), "tokens": not isinstance(config, AlignConfig), "ranks": ranks,
            "faults": [asdict(fault) for fault in faults], "elsewhere": elsewhere, "meddling": meddling,
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
    """A server, for a while."""
    it = Server(folder)
    try:
        yield it
    finally:
        assert it.process.stdin is not None
        it.process.stdin.close()
        it.process.wait()


if __name__ == "__main__":
    sys.exit(serve())
