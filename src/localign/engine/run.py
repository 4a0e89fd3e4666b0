"""The run folder: resolved config, what it may be continued with, results."""

from __future__ import annotations

import errno
import json
import platform
import subprocess
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from localign._version import __version__
from localign.engine.config import PLACES, RESUMABLE, Resume, TrainConfig
from localign.errors import UserError
from localign.files import replace_text
from localign.plainyaml import load_yaml

CONFIG_FILE, RESULTS_FILE = "config.yaml", "results.json"


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    folder: Path
    results: dict[str, Any]
    is_main: bool = True
    """Whether this process is the one that writes files and speaks."""


def plain(config: Any) -> dict[str, Any]:
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
    content = {"command": command, "config": plain(config), "versions": provenance()}
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
    old, new = {**_defaults(config), **saved["config"]}, plain(config)
    changed = [f for f in sorted({*old, *new}) if f not in RESUMABLE and old.get(f) != new.get(f)]
    changed = [f for f in changed if f not in PLACES or not _moved(old.get(f), new.get(f))]
    if changed:
        listed = "; ".join(f"{f}: {old.get(f)!r} there, {new.get(f)!r} now" for f in changed)
        raise UserError(f"cannot resume {folder} with another config: {listed}")


def _defaults(config: Any) -> dict[str, Any]:
    """The options that need not be given, with what they are then."""
    given = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    made = {f.name: f.default_factory() for f in fields(config) if f.default_factory is not MISSING}
    return plain({**given, **made})


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
        "config": plain(config),
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


def write_results(folder: Path, results: dict[str, Any]) -> Path:
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
