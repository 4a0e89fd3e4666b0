"""The run folder: resolved config, what it may be continued with, results."""

from __future__ import annotations

import errno
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import timm
import torch
import yaml

from localign._version import __version__
from localign.engine.checkpoints.replicated import Checkpoints, remove_leftovers
from localign.engine.disk import writing
from localign.engine.lock import lock
from localign.engine.log import Bar, JsonLines, Log, Sink, TensorBoard, WandB, say
from localign.errors import UserError
from localign.files import replace_text
from localign.options.names import Resume
from localign.options.train import TrainConfig
from localign.plainyaml import load_yaml

RESUMABLE: frozenset[str] = frozenset(
    {
        "out", "micro_batch", "device", "workers", "log_every", "checkpoint_every", "keep_checkpoints",
        "val_every", "resume", "tensorboard", "wandb", "compile", "grad_checkpointing", "attention", "config",
        "cross_entropy", "timeout", "reshard_after_forward", "ddp_bucket_mb",
    }
)  # fmt: skip
"""Fields that may differ when a run is continued: they change neither the samples nor the mathematics."""

PLACES: frozenset[str] = frozenset({"data", "images", "val", "weights"})
"""Fields that name files and folders. They may have moved when a run is continued, under the same last name: other
data and other weights show in the task's fingerprint."""

CONFIG_FILE, RESULTS_FILE = "config.yaml", "results.json"


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    folder: Path
    results: dict[str, Any]
    is_main: bool = True
    """Whether this process is the one that writes files and speaks."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as YAML-able values."""
    values = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    return json.loads(json.dumps(values, default=str))


def provenance() -> dict[str, Any]:
    """Versions, commit and time, for the file beside a result."""
    return {
        "localign": __version__,
        "commit": _git_commit(),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": platform.python_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _git_commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save_config(folder: Path, command: str, config: Any) -> None:
    """Write the resolved config with versions and seed."""
    content = {"command": command, "config": to_dict(config), "versions": provenance()}
    replace_text(folder / CONFIG_FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def read_config(folder: Path) -> dict[str, Any]:
    """The saved config of a run folder.

    Raises:
        UserError: There is none, or it is not what localign writes.
    """
    path = folder / CONFIG_FILE
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no run folder: it has no {CONFIG_FILE}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(f"{path} was not written by localign")
    return content


def check_same_config(folder: Path, command: str, config: Any) -> None:
    """Refuse to continue a run under a config that would make it another run.

    An option that the saved config lacks was added to localign after it: the run had what is its default now.

    Raises:
        UserError: Names the fields that differ, with both values.
    """
    saved = read_config(folder)
    if saved.get("command") != command:
        raise UserError(
            f"{folder} is a run of `localign {saved.get('command')}`, not of `localign {command}`"
        )
    old, new = {**_defaults(config), **saved["config"]}, to_dict(config)
    changed = [f for f in sorted({*old, *new}) if f not in RESUMABLE and old.get(f) != new.get(f)]
    changed = [f for f in changed if f not in PLACES or not _moved(old.get(f), new.get(f))]
    if changed:
        listed = "; ".join(f"{f}: {old.get(f)!r} there, {new.get(f)!r} now" for f in changed)
        raise UserError(f"cannot resume {folder} with another config: {listed}")


def _defaults(config: Any) -> dict[str, Any]:
    """The options that need not be given, with what they are then."""
    given = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    made = {f.name: f.default_factory() for f in fields(config) if f.default_factory is not MISSING}
    return to_dict({**given, **made})


def _moved(old: Any, new: Any) -> bool:
    """Whether two places, or lists of them, differ only in the folders above their last name."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return all(a == b or _moved(a, b) for a, b in zip(old, new, strict=True))
    if not isinstance(old, str) or not isinstance(new, str):
        return False
    return bool(Path(new).name) and Path(old).name == Path(new).name


def check_same_fingerprint(folder: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """Refuse to continue on other data or from other starting weights.

    Raises:
        UserError: Names what changed.
    """
    changed = [f for f in sorted({*old, *new}) if old.get(f) != new.get(f)]
    if changed:
        raise UserError(f"cannot resume {folder}: changed since it began: {', '.join(changed)}")


def check_start(folder: Path, resume: Resume, steps: list[int]) -> bool:
    """Whether a run is there that is to be continued, from its beginning if need be.

    Raises:
        UserError: There is nothing to resume, or a run that would be overwritten.
    """
    started = (folder / CONFIG_FILE).is_file()
    if resume == "must" and not started:
        raise UserError(f"nothing to resume in {folder}: it holds no run")
    if resume == "never" and started:
        at = f"step {steps[-1]}" if steps else "its beginning"
        raise UserError(
            f"{folder} already holds a run (at {at}); continue it with --resume, or give another --out"
        )
    return started


def check_there(folder: Path) -> None:
    """Refuse to write into a run folder that was deleted or unmounted: what would come about is no run.

    Raises:
        FileNotFoundError: It is gone.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(errno.ENOENT, "the run folder is gone", str(folder))


def training_facts(command: str, config: TrainConfig, steps: int, seconds: float) -> dict[str, Any]:
    """What ``results.json`` says of any training first.

    Args:
        command: The localign command.
        config: Of the run.
        steps: Taken.
        seconds: Of training alone.
    """
    images = steps * config.batch_size
    return {
        "command": command,
        "config": to_dict(config),
        "versions": provenance(),
        "steps": steps,
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": images / seconds if seconds else None,
    }


def bad_images_facts(bad: dict[str, str], samples: int) -> dict[str, Any]:
    """What ``results.json`` says of the unreadable images (name -> reason) among those of an epoch."""
    return {"count": len(bad), "share": len(bad) / samples, "images": bad}


def export_facts(results: dict[str, Any]) -> dict[str, Any]:
    """What is kept with exported weights."""
    facts = {"command": results["command"], "run": results["config"], "steps": results["steps"]}
    return {**facts, **results["versions"]}


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write ``results.json``."""
    path = folder / RESULTS_FILE
    replace_text(path, json.dumps(results, indent=1, allow_nan=True) + "\n")
    return path


def read_results(folder: str | Path) -> dict[str, Any]:
    """The ``results.json`` of a run.

    Raises:
        UserError: There is none, or it is no JSON.
    """
    path = Path(folder) / RESULTS_FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {RESULTS_FILE}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(results, dict):
        raise UserError(f"{path} was not written by localign")
    return results


def open_folder(
    folder: Path, command: str, config: TrainConfig, checkpoints: Checkpoints, *further: Path
) -> tuple[int | None, TextIO | None]:
    """Take a run folder, for one process.

    Args:
        folder: The run folder.
        command: The localign command.
        config: Of the run; it must fit what is there.
        checkpoints: The run's.
        further: Other folders that a killed run may have left half-written files in.

    Returns:
        The step to continue from, None for a fresh run; and the folder's lock, see :func:`lock`.

    Raises:
        UserError: The folder does not fit, is in use, or has no checkpoint that is whole.
        RunFailure: Nothing can be written there.
    """
    continued = check_start(folder, config.resume, checkpoints.steps())
    held: TextIO | None = None
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held = lock(folder)
            if continued:
                check_same_config(folder, command, config)
            else:
                save_config(folder, command, config)
            remove_leftovers(folder, checkpoints.folder, *further)
            return (newest_whole(checkpoints) if continued else None), held
    except BaseException:
        if held is not None:
            held.close()
        raise


def newest_whole(checkpoints: Checkpoints) -> int | None:
    """The newest checkpoint that is as it was written; damaged ones after it are named and set aside.

    Raises:
        UserError: There are checkpoints, and all are damaged.
    """
    damaged: list[tuple[int, str]] = []
    for step in reversed(checkpoints.all_steps()):
        try:
            checked = checkpoints.verify(step)
        except UserError as error:
            damaged.append((step, str(error)))
            continue
        for number, problem in damaged:
            say(f"{problem}; set aside as {checkpoints.set_aside(number).name}")
        if damaged:
            say(f"continuing from the checkpoint before: step {step}")
        if not checked:
            say(f"the checkpoint of step {step} has no checksums: an older localign wrote it")
        return step
    if damaged:
        others = f"; so are the {len(damaged) - 1} before it" if damaged[1:] else ""
        raise UserError(f"{damaged[0][1]}{others}. To begin anew, delete {checkpoints.folder}")
    return None


def open_log(
    command: str, config: TrainConfig, steps: int, resumed_at: int | None, validated: bool
) -> tuple[Log, Bar]:
    """The log of a run, on the one rank that writes, and the progress bar in it.

    Args:
        command: The localign command.
        config: Of the run.
        steps: Of the whole run.
        resumed_at: The step that is continued from; what was logged after it is dropped.
        validated: As of :class:`JsonLines`.
    """
    folder, bar = Path(config.out), Bar(command, steps, resumed_at or 0)
    sinks: list[Sink] = [JsonLines(folder, resumed_at, validated), bar]
    if config.tensorboard:
        sinks.append(TensorBoard(folder, resumed_at))
    if config.wandb:
        sinks.append(WandB(folder, config.wandb, to_dict(config)))
    return Log(sinks), bar
