"""Opening a run folder: who writes into it, which checkpoint is whole, where numbers go."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from localign.engine import run as runs
from localign.engine.checkpoint import Checkpoints, remove_leftovers
from localign.engine.config import TrainConfig
from localign.engine.disk import writing
from localign.engine.lock import lock
from localign.engine.log import Bar, JsonLines, Log, Sink, TensorBoard, WandB, say
from localign.errors import UserError


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
    continued = runs.check_start(folder, config.resume, checkpoints.steps())
    held: TextIO | None = None
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held = lock(folder)
            if continued:
                runs.check_same_config(folder, command, config)
            else:
                runs.save_config(folder, command, config)
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
        sinks.append(WandB(folder, config.wandb, runs.plain(config)))
    return Log(sinks), bar
