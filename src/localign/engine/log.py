"""Logging: log.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from localign.errors import UserError
from localign.files import replace_text
from localign.text.printing import printable

LOG_FILE = "log.jsonl"


class Sink(Protocol):
    """A destination of log entries."""

    def write(self, entry: dict[str, Any]) -> None:
        """Write one entry: ``step`` and values by name."""

    def close(self) -> None:
        """Flush and close."""


class JsonLines:
    """``log.jsonl``: one JSON object per line. A resumed run first deletes the entries after its checkpoint.

    Args:
        folder: The run folder.
        resumed_at: The checkpoint's step; None for a fresh run.
        validated: Whether the checkpoint's validation metrics are of its own step. If not, as after a stop signal, the
            resumed run validates at that step, so an earlier validation entry of that step is deleted too.
    """

    def __init__(self, folder: Path, resumed_at: int | None, validated: bool = True) -> None:
        path = folder / LOG_FILE
        if resumed_at is None:
            path.unlink(missing_ok=True)
        elif path.is_file():
            last = resumed_at if validated else resumed_at - 1
            entries = read_log(folder)
            lines = [
                json.dumps(e) for e in entries if e["step"] <= (last if _is_validation(e) else resumed_at)
            ]
            replace_text(path, "".join(line + "\n" for line in lines))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _is_validation(entry: dict[str, Any]) -> bool:
    return "samples" not in entry and "skipped_image" not in entry


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The entries of a run's log, up to the first broken line. A kill can cut off the last line."""
    path = Path(folder) / LOG_FILE
    entries: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.split("\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            break
        entries.append(entry)
    return entries


class TensorBoard:
    """Writes the log's numbers for TensorBoard."""

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("TensorBoard is not installed; pip install 'localign[tensorboard]'") from error
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Writes the log's numbers to a Weights & Biases run. A resumed run keeps the id."""

    def __init__(self, folder: Path, project: str, config: dict[str, Any], resumed: bool = False) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("wandb is not installed; pip install 'localign[wandb]'") from error
        self._run = wandb.init(
            project=project, dir=str(folder), config=config, id=wandb_id(folder, resumed), resume="allow"
        )

    def write(self, entry: dict[str, Any]) -> None:
        values = {k: v for k, v in entry.items() if isinstance(v, (int, float))}
        self._run.log(values, step=entry["step"])

    def close(self) -> None:
        self._run.finish()


def wandb_id(folder: Path, resumed: bool) -> str:
    """The id of a run: its folder's name and a hash of the whole path, so that runs of one name stay apart.

    A resumed run keeps the id that it has, even if the folder has moved or an earlier version chose the id.
    """
    folder = folder.resolve()
    if resumed:
        names = (path.name.removeprefix("offline-") for path in (folder / "wandb").glob("*run-*-*"))
        if kept := sorted(name for name in names if name.startswith("run-")):  # run-DATE-ID
            return kept[-1].split("-", 2)[2]
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", folder.name)[:50]
    return f"{name}-{digest}"


def check_sinks(tensorboard: bool, wandb: bool) -> None:
    """Check that the packages of a run's logs are installed, before the run has a folder.

    Raises:
        UserError: One is missing.
    """
    for wanted, module, name in (
        (tensorboard, "tensorboard", "TensorBoard"),
        (wandb, "wandb", "wandb"),
    ):
        if wanted and find_spec(module) is None:
            raise UserError(f"{name} is not installed; pip install 'localign[{module}]'")


class Log:
    """Writes each entry to several sinks; to none on ranks other than the main one."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, step: int, **values: Any) -> None:
        """Write the values of one step."""
        for sink in self._sinks:
            sink.write({"step": step, **values})

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def say(text: str) -> None:
    """Print a line for the user on standard error; standard output stays machine-readable."""
    print(printable(text), file=sys.stderr, flush=True)


class Stopwatch:
    """Wall seconds between two log lines, and how many of them were spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self._start = time.perf_counter()
        self.waited = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the interval started, without pauses."""
        return time.perf_counter() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside the block."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the block as waiting for data."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - before


def print_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Print the last lines of a training command on standard output.

    Args:
        folder: The run folder.
        results: The content of ``results.json``.
    """
    rate = results["images_per_second"]
    print(f"trained    {results['steps']} steps, {results['images']} images, {rate:.1f} images/s")
    if results["final"]:
        print("validation " + ", ".join(f"{k} {v:.4f}" for k, v in results["final"].items()))
    skipped = results["skipped_images"]
    if skipped["count"]:
        names = ", ".join(map(printable, list(skipped["images"])[:5])) + (
            ", ..." if skipped["count"] > 5 else ""
        )
        print(f"skipped    {skipped['count']} unreadable images ({skipped['share']:.2%}): {names}")
    print(f"results    {printable(folder / 'results.json')}")
    print(f"export     {printable(folder / 'export')}")
