"""Checkpoints of runs in which every rank holds the full model: folders ``step-<n>`` of safetensors and one JSON file.

A checkpoint is complete or absent: it is written to a temporary folder, which is then renamed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from localign.engine.checkpoints.checksums import check_files, files_info, read_sealed
from localign.engine.checkpoints.state import STATE_FILE, SavedState, check_types, is_best, state_text
from localign.engine.optim.build import state_names
from localign.errors import UserError
from localign.files import replace_text, replacing_folder
from localign.results import BestCheckpoint
from localign.text.printing import first_line
from localign.weights import load_strict

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "ema.safetensors"
BEST_FILE = "best.json"
_STEP_FOLDER = re.compile(r"step-(\d+)$")
_DAMAGED = ".damaged"


@dataclass(frozen=True)
class CheckpointContent:
    """The content of a checkpoint, on the CPU."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: SavedState


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``<run>/checkpoints``.
        keep: How many of the newest checkpoints to keep. The best one is always kept.
        included: Whether checkpoints hold the module's tensor with this name. A resumed run builds all other tensors
            anew.
    """

    def __init__(
        self, folder: Path, keep: int = 2, included: Callable[[str], bool] = lambda name: True
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.included = included

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return [step for step in self.all_steps() if (self.path(step) / STATE_FILE).is_file()]

    def all_steps(self) -> list[int]:
        """The steps of all checkpoint folders, complete or not, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP_FOLDER.match(p.name) for p in self.folder.iterdir() if p.is_dir())
        return sorted(int(m.group(1)) for m in matches if m)

    def resume_hint(self) -> str:
        """How to resume the run, for the error line of a failed run."""
        steps = self.steps()
        return f"--resume continues from step {steps[-1]}" if steps else "there is no checkpoint"

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step-{step:07d}"

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        ema: nn.Module | None = None,
    ) -> Path:
        """Write a checkpoint, then delete checkpoints that are no longer needed.

        Args:
            step: Optimizer steps taken. There is no checkpoint of this step yet.
            module, optimizer, ema: Their tensors are saved.
            state: JSON-able; saved too. If its ``best`` is this step, the checkpoint is marked as the best.
        """
        path = self.path(step)
        with replacing_folder(path) as temporary:
            save_file(_cpu_copies(self._included_state(module)), temporary / MODEL_FILE)
            save_file(_cpu_copies(optimizer_tensors(module, optimizer)), temporary / OPTIMIZER_FILE)
            if ema is not None:
                save_file(_cpu_copies(self._included_state(ema)), temporary / EMA_FILE)
            files = files_info(temporary.iterdir())
            (temporary / STATE_FILE).write_text(state_text(step, state, files), encoding="utf-8")
        self._finish_saving(step, state.get("best"))
        return path

    def wait(self) -> None:
        """Wait until the last :meth:`save` has finished."""

    def _included_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's tensors that checkpoints hold, by name."""
        return {name: tensor for name, tensor in module.state_dict().items() if self.included(name)}

    def _finish_saving(self, step: int, best: BestCheckpoint | None) -> None:
        """Delete old checkpoints, and mark the new one if it is the best."""
        self._prune()
        if best is not None and best["step"] == step:
            self.mark_best(**best)

    def mark_best(self, step: int, val_loss: float) -> None:
        """Record which checkpoint has the lowest validation loss."""
        replace_text(self.folder / BEST_FILE, json.dumps({"step": step, "val_loss": val_loss}) + "\n")
        self._prune()

    def best(self) -> BestCheckpoint | None:
        """The checkpoint that is marked as the best; None if there is no readable mark."""
        try:
            best = json.loads((self.folder / BEST_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return cast(BestCheckpoint, best) if is_best(best) else None

    def _prune(self) -> None:
        best, steps = self.best(), self.steps()
        for step in steps[: -self.keep]:
            if best is None or step != best["step"]:
                shutil.rmtree(self.path(step), ignore_errors=True)
        for damaged in self.folder.glob(f"step-*{_DAMAGED}"):
            match = _STEP_FOLDER.match(damaged.name.removesuffix(_DAMAGED))
            if match and int(match.group(1)) <= max(steps, default=-1):
                shutil.rmtree(damaged, ignore_errors=True)

    def set_aside(self, step: int) -> Path:
        """Rename the folder of a damaged checkpoint. It is deleted once the run has passed its step."""
        path = self.path(step)
        target = path.with_name(path.name + _DAMAGED)
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
        return target

    def unmark_best(self) -> None:
        """Delete the mark of the best checkpoint."""
        (self.folder / BEST_FILE).unlink(missing_ok=True)

    def verify(self, step: int) -> bool:
        """Read all files of a checkpoint and compare their checksums.

        Returns:
            False if the checkpoint has no checksums; only its JSON file was read then.

        Raises:
            UserError: The checkpoint is damaged; the line names the file.
        """
        path, state = self.path(step), self.state(step)
        if "files" not in state:
            return False
        with reading(path):
            if problem := check_files(path, state["files"]):
                raise ValueError(problem)
        return True

    def state(self, step: int) -> SavedState:
        """Read the JSON file of a checkpoint.

        Raises:
            UserError: The file is damaged.
        """
        path = self.path(step)
        with reading(path), _naming(STATE_FILE):
            state = read_sealed((path / STATE_FILE).read_text(encoding="utf-8"))
            check_types(state)
            return cast(SavedState, state)

    def load(self, step: int) -> CheckpointContent:
        """Verify a checkpoint and read it.

        Raises:
            UserError: The checkpoint is damaged.
        """
        self.verify(step)
        return self._read(step)

    def _read(self, step: int) -> CheckpointContent:
        path, state = self.path(step), self.state(step)
        with reading(path):
            model, optimizer = load_file(path / MODEL_FILE), load_file(path / OPTIMIZER_FILE)
            ema = load_file(path / EMA_FILE) if (path / EMA_FILE).is_file() else None
        return CheckpointContent(step, model, optimizer, ema, state)

    def restore(
        self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None
    ) -> None:
        """Load the tensors of a verified checkpoint into a module, its optimizer and its average.

        Raises:
            UserError: A file cannot be read, or tensors are missing or unexpected; the line names them.
        """
        path, content = self.path(step), self._read(step)
        load_module(module, content.model, path / MODEL_FILE, self.included)
        load_optimizer_tensors(module, optimizer, content.optimizer, path / OPTIMIZER_FILE)
        if ema is not None:
            load_module(ema, content.ema or {}, path / EMA_FILE, self.included)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors from reading inside the block into a UserError: the checkpoint at ``path`` is damaged."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} is damaged: {first_line(error)}") from error


@contextmanager
def _naming(file: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {first_line(error)}") from error


def _cpu_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<state name>.<parameter name>``, independent of the order of parameters."""
    names = {id(p): n for n, p in module.named_parameters()}
    return {
        f"{state_name}.{names[id(p)]}": torch.as_tensor(value)
        for p, values in optimizer.state.items()
        for state_name, value in values.items()
    }


def load_optimizer_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], source: str | Path
) -> None:
    """The inverse of :func:`optimizer_tensors`.

    Raises:
        UserError: State of a trainable parameter is missing or has a wrong shape, or there is state of unknown
            parameters.
    """
    left = dict(tensors)
    wanted = state_names(optimizer) if tensors else {}
    for name, parameter in module.named_parameters():
        found = {k.removesuffix(f".{name}"): v for k, v in tensors.items() if k.partition(".")[2] == name}
        for state_name in found:
            del left[f"{state_name}.{name}"]
        if missing := wanted.get(parameter, frozenset()) - found.keys():
            raise UserError(f"{source} lacks the optimizer state of {name}: {', '.join(sorted(missing))}")
        if bad := [k for k, v in found.items() if v.shape not in (parameter.shape, torch.Size())]:
            raise UserError(f"{source} has optimizer state of a wrong shape for {name}: {', '.join(bad)}")
        if found:
            # Fused optimizers need the step count on the parameter's device too.
            # A copy, because safetensors may give a view of the memory-mapped file.
            optimizer.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in found.items()}
    if left:
        raise UserError(f"{source} has optimizer state of unknown parameters: {', '.join(sorted(left)[:4])}")


def load_module(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str | Path,
    included: Callable[[str], bool] = lambda name: True,
) -> None:
    """Load tensors into a module. Tensors that checkpoints do not hold stay as they are.

    Raises:
        UserError: Tensors are missing or unexpected; the line names them.
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if not included(name)}
    if unexpected := sorted(own.keys() & tensors.keys()):
        raise UserError(
            f"{source} does not fit: it has {len(unexpected)} tensors that this run does not save ({unexpected[0]})"
        )
    load_strict(module, {**own, **tensors}, source)
