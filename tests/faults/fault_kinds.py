"""What goes wrong in fault tests, and when: in a step, or before a function does its work."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localign import files
from localign.engine import log as logs
from localign.engine import run_folder
from localign.engine.checkpoints import replicated as checkpoints
from localign.engine.checkpoints import sharded


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    kind: str
    """A key of one of the tables below."""
    step: int
    """The first step that it can happen in, counted from 0."""
    rank: int = 0
    """Whom it happens to."""


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
    "kill -9 before old checkpoints go": at(checkpoints.Checkpoints, "_finish_saving", die),
    "kill -9 while logging": at(logs.JsonLines, "write", half_a_line),
    "kill -9 while exporting": at(run_folder, "write_results", die),
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
