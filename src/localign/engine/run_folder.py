"""The run folder: resolved config, checks before a resume, log and results."""

from __future__ import annotations

import errno
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import timm
import torch
import yaml

from localign._version import __version__
from localign.deprecated import REVISION, lost_meaning, with_meanings_of_now, with_new_names
from localign.engine.checkpoints.replicated import Checkpoints
from localign.engine.log import JsonLines, Log, Sink, TensorBoard, WandB, check_sinks, read_log, say
from localign.engine.progress import Bar
from localign.errors import UserError
from localign.files import replace_text, sweep
from localign.files.disk import writing
from localign.files.output import RUN_FILES, OutputFolder
from localign.options.names import Resume
from localign.options.train import TrainConfig
from localign.results import SavedConfig, SkippedImages, TrainingResults, Versions
from localign.text.printing import printable
from localign.text.reading import read_json_object, read_yaml

RESUMABLE: frozenset[str] = frozenset(
    {
        "out", "micro_batch", "device", "workers", "log_every", "checkpoint_every", "keep_checkpoints",
        "val_every", "resume", "tensorboard", "wandb", "compile", "grad_checkpointing", "attention", "config",
        "cross_entropy", "timeout", "reshard_after_forward", "ddp_bucket_mb", "max_row_group_gib",
        "accept_changed_data", "allow_outside", "profile", "decoder_mlp",
    }
)  # fmt: skip
"""Config fields that may change on resume: they change neither the samples nor the mathematics, or the checkpoint fits
one value alone."""

PATH_FIELDS: frozenset[str] = frozenset({"data", "images", "val", "weights", "teacher"})
"""Config fields with paths. Files and folders may have moved on resume, as long as their last name is the same. The
task's fingerprint detects other data and other weights."""

CONFIG_FILE, RESULTS_FILE = "config.yaml", "results.json"


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    folder: Path
    results: dict[str, Any]
    """:class:`~localign.results.TrainingResults` and the task's summary."""
    is_main: bool = True
    """Whether this process is rank 0, which writes files and shows progress."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass or mapping as values that YAML and JSON can hold."""
    values = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    return cast(dict[str, Any], json.loads(json.dumps(values, default=str)))


def provenance() -> Versions:
    """The versions, commit and time to save with a result."""
    return {
        "localign": __version__,
        "commit": _git_commit(),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": platform.python_version(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _git_commit() -> str | None:
    """The commit of a source checkout; None for an installed package or without git."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save_config(folder: Path, command: str, config: Any) -> None:
    """Write ``config.yaml``."""
    content: SavedConfig = {
        "command": command,
        "config": to_dict(config),
        "versions": provenance(),
        "revision": REVISION,
    }
    replace_text(folder / CONFIG_FILE, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def read_config(folder: Path) -> SavedConfig:
    """Read ``config.yaml`` of a run folder, with the options under the names, and with the meanings, they have now.

    Raises:
        UserError: The file is missing, or was not written by localign.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{printable(folder)} is not a run folder: it has no {CONFIG_FILE}")
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(f"{path} was not written by localign")
    command, revision = content.get("command"), content.setdefault("revision", 1)
    if not isinstance(revision, int):
        raise UserError(f"{path} was not written by localign: its revision is not a number")
    content["config"] = with_meanings_of_now(with_new_names(content["config"], command), command, revision)
    return cast(SavedConfig, content)


def check_same_config(folder: Path, command: str, config: Any) -> None:
    """Refuse to resume a run with a config that would change its results.

    An option that the saved config lacks was added to localign later; the run is taken to have its default.

    Raises:
        UserError: Options differ; the line names them with both values.
    """
    saved = read_config(folder)
    if saved.get("command") != command:
        raise UserError(
            f"{folder} is a run of `localign {saved.get('command')}`, not of `localign {command}`"
        )
    if lost := lost_meaning(saved["config"], command, saved["revision"]):
        raise UserError(f"cannot resume {folder}: {lost}. Start the run anew in another folder")
    old, new = {**_defaults(config), **saved["config"]}, to_dict(config)
    changed = [f for f in sorted({*old, *new}) if f not in RESUMABLE and old.get(f) != new.get(f)]
    changed = [f for f in changed if f not in PATH_FIELDS or not _moved(old.get(f), new.get(f))]
    if changed:
        listed = "; ".join(f"{f}: {old.get(f)!r} before, {new.get(f)!r} now" for f in changed)
        hint = ""
        if saved["revision"] < 2 and "crop" in changed and old["crop"] == "rkrc":
            hint = (
                "; the run's crop is called rkrc since the published ranges were corrected: add --crop rkrc"
            )
        raise UserError(f"cannot resume {folder} with a different config: {listed}{hint}")


def _defaults(config: Any) -> dict[str, Any]:
    """The default values of a config's options."""
    plain = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    made = {f.name: f.default_factory() for f in fields(config) if f.default_factory is not MISSING}
    return to_dict({**plain, **made})


def _moved(old: Any, new: Any) -> bool:
    """Whether two paths, or lists of paths, differ only in the folders above their last name."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return all(a == b or _moved(a, b) for a, b in zip(old, new, strict=True))
    if not isinstance(old, str) or not isinstance(new, str):
        return False
    return bool(Path(new).name) and Path(old).name == Path(new).name


def check_resume(folder: Path, resume: Resume, steps: list[int]) -> bool:
    """Whether the folder holds a run to resume, with or without a checkpoint. A start that failed is none.

    Args:
        folder: The run folder.
        resume: The option.
        steps: Steps of the run's checkpoints.

    Raises:
        UserError: There is no run to resume, a run would be overwritten, or the run has lost its config.
    """
    started = (folder / CONFIG_FILE).is_file()
    if steps and not started:
        raise UserError(
            f"{printable(folder)} holds checkpoints (up to step {steps[-1]}) but no {CONFIG_FILE}, which says what the "
            f"run is; restore {CONFIG_FILE}, or move the folder away to start anew"
        )
    if resume == "must" and not started:
        raise UserError(f"nothing to resume in {folder}: it holds no run")
    if resume == "never" and started and not steps and _is_untouched(folder):
        return False
    if resume == "never" and started:
        at = f"step {steps[-1]}" if steps else "the start"
        raise UserError(
            f"{folder} already holds a run (at {at}); continue it with --resume, or choose another --out"
        )
    return started


def _is_untouched(folder: Path) -> bool:
    """Whether a run failed before its first line in the log, so that a new start loses nothing."""
    return not (folder / RESULTS_FILE).exists() and not read_log(folder)


def check_exists(folder: Path) -> None:
    """Refuse to write to a run folder that was deleted or unmounted.

    Raises:
        FileNotFoundError: The folder is gone.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(errno.ENOENT, "the run folder is gone", str(folder))


def training_results(command: str, config: TrainConfig, steps: int, seconds: float) -> TrainingResults:
    """The first entries in ``results.json`` of any training.

    Args:
        command: The localign command.
        config: The run's config.
        steps: Optimizer steps taken.
        seconds: Training time.
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


def summarize_skipped(bad: dict[str, str], samples: int) -> SkippedImages:
    """The entry of ``results.json`` about unreadable images.

    Args:
        bad: Name -> reason.
        samples: Samples in an epoch.
    """
    return {"count": len(bad), "share": len(bad) / samples, "images": bad}


def export_provenance(results: TrainingResults) -> dict[str, Any]:
    """The command, config, steps and versions to save with exported weights."""
    run = {"command": results["command"], "run": results["config"], "steps": results["steps"]}
    return {**run, **results["versions"]}


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write ``results.json``."""
    path = folder / RESULTS_FILE
    replace_text(path, json.dumps(results, indent=1, allow_nan=True) + "\n")
    return path


def read_results(folder: str | Path) -> dict[str, Any]:
    """Read ``results.json`` of a run folder, of any command.

    Raises:
        UserError: The file is missing or is not a JSON object.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.exists():
        raise UserError(f"{printable(folder)} has no {RESULTS_FILE}")
    return read_json_object(path)


def open_folder(
    folder: Path, command: str, config: TrainConfig, checkpoints: Checkpoints, *further: Path
) -> tuple[int | None, OutputFolder]:
    """Create or reopen a run folder and lock it. Called on the main rank only.

    Args:
        folder: The run folder.
        command: The localign command.
        config: The run's config. On resume it must fit the saved one.
        checkpoints: The run's checkpoints.
        further: Other folders to clean of temporary files that a killed run left.

    Returns:
        The step to resume from, None for a fresh run; and the folder, to be closed after the last write.

    Raises:
        UserError: The folder does not fit, is in use, or all its checkpoints are damaged.
        RunFailure: The folder cannot be written to.
    """
    check_sinks(config.tensorboard, config.wandb is not None)
    with writing(folder):
        output = OutputFolder(folder, command, RUN_FILES)
    try:
        resumes = check_resume(folder, config.resume, checkpoints.steps())
        with writing(folder):
            if resumes:
                check_same_config(folder, command, config)
            else:
                save_config(folder, command, config)
            sweep(checkpoints.folder, *further)
            return (newest_intact(checkpoints) if resumes else None), output
    except BaseException:
        output.close()
        raise


def newest_intact(checkpoints: Checkpoints) -> int | None:
    """The step of the newest undamaged checkpoint. Newer, damaged checkpoints are reported and set aside.

    Raises:
        UserError: All checkpoints are damaged.
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
            say(f"resuming from the previous checkpoint: step {step}")
        if not checked:
            say(f"the checkpoint of step {step} has no checksums: an older version of localign wrote it")
        return step
    if damaged:
        others = f"; so are the {len(damaged) - 1} before it" if damaged[1:] else ""
        raise UserError(f"{damaged[0][1]}{others}. To start again, delete {checkpoints.folder}")
    return None


def open_log(
    command: str, config: TrainConfig, steps: int, resumed_at: int | None, validated: bool
) -> tuple[Log, Bar]:
    """Open the log of a run on the main rank, and the progress bar that is part of it.

    Args:
        command: The localign command.
        config: The run's config.
        steps: Steps of the whole run.
        resumed_at, validated: As for :class:`JsonLines`.
    """
    folder, bar = Path(config.out), Bar(command, steps, resumed_at or 0)
    sinks: list[Sink] = [JsonLines(folder, resumed_at, validated), bar]
    if config.tensorboard:
        sinks.append(TensorBoard(folder, resumed_at))
    if config.wandb:
        sinks.append(WandB(folder, config.wandb, to_dict(config), resumed_at is not None))
    return Log(sinks), bar
