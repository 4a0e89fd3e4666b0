"""The faults of the fault tests. They strike during a step, or before a certain function runs."""

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
    """One fault."""

    kind: str
    """A key of one of the tables below."""
    step: int
    """The first step in which it can strike, counted from 0."""
    rank: int = 0
    """The rank that it strikes."""


class FaultState:
    """This process's current step and pending faults."""

    step = -1
    pending: list[Fault] = []  # noqa: RUF012

    @classmethod
    def due(cls, kind: str) -> bool:
        """Whether a fault of this kind strikes now. It is removed, so it strikes once."""
        for fault in cls.pending:
            if fault.kind == kind and fault.rank == my_rank() and cls.step >= fault.step:
                cls.pending.remove(fault)
                return True
        return False


def my_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def send(number: int) -> Callable[[], None]:
    """A fault that sends a signal to this process."""
    return lambda: os.kill(os.getpid(), number)


def pause() -> None:
    """Stop the process for a moment, as a debugger or an overloaded host does."""
    subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_a_worker() -> None:
    pid = os.getpid()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


def fill_disk(out: Path) -> None:
    """Fill a small file system to the last byte with another file."""
    with suppress(OSError), (out.parent / "ballast").open("wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 10, 1):
            with suppress(OSError):
                while True:
                    ballast.write(b"x" * size)


def make_read_only(out: Path) -> None:
    for options in (["--bind", out, out], ["-o", "remount,bind,ro", out]):
        subprocess.run(["mount", *map(str, options)], check=True)


def take_away(out: Path) -> None:
    out.rename(out.with_name("moved-away"))


def raising(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


WRITES: list[tuple[Any, str]] = [
    (checkpoints, "save_file"), (sharded, "save_file"), (files, "fsync_path"), (sharded, "fsync_path"),
    (logs.JsonLines, "write"),
]  # fmt: skip
"""What writes files: owner, name of the function."""


def no_writes(number: int) -> Callable[[], None]:
    """Make all writes fail; used where no small file system can be mounted."""

    def strike() -> None:
        for owner, name in WRITES:
            setattr(owner, name, raising(number))

    return strike


def before(kind: str, owner: Any, name: str, strike: Callable[[Any], None]) -> None:
    """Let a pending fault strike before a function runs. The fault gets the function's first argument."""
    function = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        if FaultState.due(kind):
            strike(args[0] if args else None)
        return function(*args, **kwargs)

    setattr(owner, name, struck)


def half_a_file(number: int) -> Callable[[str], None]:
    """Send a signal while a checkpoint's tensors are half written."""

    def install(kind: str) -> None:
        for module, name in WRITES[:2]:
            save_file: Any = getattr(module, name)

            def struck(tensors: Any, path: Path, save: Any = save_file, **kwargs: Any) -> None:
                if FaultState.due(kind):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(b"half")
                    os.kill(os.getpid(), number)
                save(tensors, path, **kwargs)

            setattr(module, name, struck)

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

    for module, name in WRITES[2:4]:
        setattr(module, name, slow)


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
"""Strike in a step too, and get the run folder."""
OUTSIDE_STEPS: dict[str, Callable[[str], None]] = {
    "kill -9 while saving": half_a_file(signal.SIGKILL),
    "SIGTERM while saving": half_a_file(signal.SIGTERM),
    "kill -9 before a rename": at(files, "put_in_place", die),
    "kill -9 before old checkpoints go": at(checkpoints.Checkpoints, "_finish_saving", die),
    "kill -9 while logging": at(logs.JsonLines, "write", half_a_line),
    "kill -9 while exporting": at(run_folder, "write_results", die),
}
"""Installed before the run. They strike after the step is reached."""


def install(faults: list[Fault], out: Path) -> Callable[[int], None]:
    """Prepare faults. The returned function must be called at each step."""
    FaultState.pending, FaultState.step = faults, -1
    for fault in faults:
        if fault.kind in OUTSIDE_STEPS:
            OUTSIDE_STEPS[fault.kind](fault.kind)
            sharded.put_in_place = files.put_in_place  # type: ignore[attr-defined,unused-ignore]

    def at_step(number: int) -> None:
        FaultState.step = number
        for kind in [fault.kind for fault in FaultState.pending]:
            if kind not in OUTSIDE_STEPS and FaultState.due(kind):
                ON_THE_DISK[kind](out) if kind in ON_THE_DISK else IN_A_STEP[kind]()

    return at_step
