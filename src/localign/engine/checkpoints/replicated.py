"""Checkpoints: folders ``step-<n>`` of safetensors and one JSON file, whole or absent."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from localign.engine.checkpoints.checksums import (
    FILES,
    FileFacts,
    facts_of,
    files_problem,
    read_sealed,
    sealed_text,
)
from localign.engine.optim.build import state_kinds
from localign.errors import UserError
from localign.files import replace_text, replacing_folder
from localign.weights import load_strict

STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "ema.safetensors"
BEST_FILE = "best.json"
STATE_FIELDS = frozenset(
    {"fingerprint", "task", "guard", "digest", "bad_images", "seconds", "best", "validation"}
)
"""What the loop needs of a checkpoint's JSON file."""
_STEP_FOLDER = re.compile(r"step-(\d+)$")
_DAMAGED = ".damaged"


@dataclass(frozen=True)
class CheckpointContent:
    """A checkpoint's content, on the CPU."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``<run>/checkpoints``.
        keep: How many of the newest to keep; the best is kept besides.
        included: Whether a tensor of the module is written, by its name; one that is not keeps, when a run is
            continued, the value it was built with.
    """

    def __init__(
        self, folder: Path, keep: int = 2, included: Callable[[str], bool] = lambda name: True
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.included = included

    def steps(self) -> list[int]:
        """The steps there are complete checkpoints of, ascending."""
        return [step for step in self.all_steps() if (self.path(step) / STATE_FILE).is_file()]

    def all_steps(self) -> list[int]:
        """The steps there are folders of, ascending, whatever is in them."""
        if not self.folder.is_dir():
            return []
        found = (_STEP_FOLDER.match(p.name) for p in self.folder.iterdir() if p.is_dir())
        return sorted(int(m.group(1)) for m in found if m)

    def resume_hint(self) -> str:
        """How a run that has failed goes on, for the line that says so."""
        steps = self.steps()
        return f"--resume continues from step {steps[-1]}" if steps else "there is no checkpoint"

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step:07d}"

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        ema: nn.Module | None = None,
    ) -> Path:
        """Write the state after ``step`` optimizer steps, then drop checkpoints that are no longer needed.

        Args:
            step: Its number; there is no checkpoint of it yet.
            module, optimizer, ema: Their tensors are written.
            state: What else is written, JSON-able. Where its ``best`` is this step, that is marked too.
        """
        path = self.path(step)
        with replacing_folder(path) as temporary:
            save_file(_tensors(self._included_state(module)), temporary / MODEL_FILE)
            save_file(_tensors(optimizer_tensors(module, optimizer)), temporary / OPTIMIZER_FILE)
            if ema is not None:
                save_file(_tensors(self._included_state(ema)), temporary / EMA_FILE)
            files = facts_of(temporary.iterdir())
            (temporary / STATE_FILE).write_text(state_text(step, state, files), encoding="utf-8")
        self._tidy(step, state.get("best"))
        return path

    def wait(self) -> None:
        """Until what was saved is there."""

    def _included_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's tensors that checkpoints hold, by name."""
        return {name: tensor for name, tensor in module.state_dict().items() if self.included(name)}

    def _tidy(self, step: int, best: Mapping[str, Any] | None) -> None:
        """With a step's checkpoint in its place: drop what is no longer needed; mark it, if it is the best."""
        self._prune()
        if best is not None and best["step"] == step:
            self.mark_best(**best)

    def mark_best(self, step: int, val_loss: float) -> None:
        """Note which checkpoint had the lowest validation loss."""
        replace_text(self.folder / BEST_FILE, json.dumps({"step": step, "val_loss": val_loss}) + "\n")
        self._prune()

    def best(self) -> dict[str, Any] | None:
        """``{"step": ..., "val_loss": ...}`` of the best checkpoint, if one is marked legibly."""
        try:
            best = json.loads((self.folder / BEST_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return best if isinstance(best, dict) and isinstance(best.get("step"), int) else None

    def _prune(self) -> None:
        best, steps = (self.best() or {}).get("step"), self.steps()
        for step in steps[: -self.keep]:
            if step != best:
                shutil.rmtree(self.path(step), ignore_errors=True)
        for aside in self.folder.glob(f"step-*{_DAMAGED}"):
            step_folder = _STEP_FOLDER.match(aside.name.removesuffix(_DAMAGED))
            if step_folder and int(step_folder.group(1)) <= max(steps, default=-1):
                shutil.rmtree(aside, ignore_errors=True)

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that it counts no longer; it goes when its step is saved again."""
        path = self.path(step)
        aside = path.with_name(path.name + _DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        return aside

    def unmark_best(self) -> None:
        """No checkpoint is the best."""
        (self.folder / BEST_FILE).unlink(missing_ok=True)

    def verify(self, step: int) -> bool:
        """Read all files of a checkpoint and compare them with what was written.

        Returns:
            Whether it has checksums; without them nothing but its JSON file was read.

        Raises:
            UserError: It is damaged; the line says where.
        """
        path, state = self.path(step), self.state(step)
        if FILES not in state:
            return False
        with reading(path):
            if problem := files_problem(path, state[FILES]):
                raise ValueError(problem)
        return True

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds beside tensors.

        Raises:
            UserError: It is damaged.
        """
        path = self.path(step)
        with reading(path), _named(STATE_FILE):
            return read_sealed((path / STATE_FILE).read_text(encoding="utf-8"))

    def load(self, step: int) -> CheckpointContent:
        """Check a checkpoint and read it.

        Raises:
            UserError: It is damaged.
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
        """Put the tensors of a checkpoint that was verified where they came from.

        Raises:
            UserError: It cannot be read, or lacks or has tensors that it should not; they are named.
        """
        path, loaded = self.path(step), self._read(step)
        load_module(module, loaded.model, path / MODEL_FILE, self.included)
        load_optimizer_tensors(module, optimizer, loaded.optimizer, path / OPTIMIZER_FILE)
        if ema is not None:
            load_module(ema, loaded.ema or {}, path / EMA_FILE, self.included)


def state_text(step: int, state: Mapping[str, Any], files: Mapping[str, FileFacts]) -> str:
    """The content of a checkpoint's JSON file; ``files`` are the others of its folder."""
    return sealed_text({"step": step, **state}, files)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, what cannot be read makes the checkpoint at ``path`` a damaged one, a UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} is damaged: {_cause(error)}") from error


@contextmanager
def _named(file: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def remove_leftovers(*folders: Path) -> None:
    """Delete what a killed run left half-written right inside the folders, where they exist."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by ``<kind>.<parameter name>``, so that it does not hang on parameter order."""
    names = {id(p): n for n, p in module.named_parameters()}
    return {
        f"{kind}.{names[id(p)]}": torch.as_tensor(value)
        for p, values in optimizer.state.items()
        for kind, value in values.items()
    }


def load_optimizer_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], source: str | Path
) -> None:
    """The inverse of :func:`optimizer_tensors`.

    Raises:
        UserError: State is missing for a trainable parameter, or left over.
    """
    left = dict(tensors)
    wanted = state_kinds(optimizer) if tensors else {}
    for name, parameter in module.named_parameters():
        found = {k.removesuffix(f".{name}"): v for k, v in tensors.items() if k.split(".", 1)[1] == name}
        for kind in found:
            del left[f"{kind}.{name}"]
        if lacks := wanted.get(parameter, frozenset()) - found.keys():
            lacking = ", ".join(sorted(lacks))
            raise UserError(f"{source} lacks the optimizer state of {name}: {lacking}")
        if found:
            # The step counter belongs where a fused optimizer reads it; moments beside their parameter.
            # A copy: what safetensors gives may be the file itself, mapped into memory.
            optimizer.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in found.items()}
    if left:
        raise UserError(f"{source} has optimizer state of unknown parameters: {', '.join(sorted(left)[:4])}")


def load_module(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str | Path,
    included: Callable[[str], bool] = lambda name: True,
) -> None:
    """Strict loading; missing and extra tensors are named. Those that are not included stay as they are."""
    own = {name: tensor for name, tensor in module.state_dict().items() if not included(name)}
    if surplus := sorted(own.keys() & tensors.keys()):
        raise UserError(
            f"{source} does not fit: {len(surplus)} tensors that are kept in no checkpoint ({surplus[0]})"
        )
    load_strict(module, {**own, **tensors}, source)
