"""Checkpoints: folders ``step-<n>`` of safetensors and one JSON file, whole or absent."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from localign.backbones.weights import load_strict
from localign.errors import UserError
from localign.files import replace_text, replacing_folder

STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
EMA_FILE = "ema.safetensors"
BEST_FILE = "best.json"
_STEP_FOLDER = re.compile(r"step-(\d+)$")


@dataclass(frozen=True)
class Loaded:
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
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps there are complete checkpoints of, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_STEP_FOLDER.match(p.name) for p in self.folder.iterdir() if (p / STATE_FILE).is_file())
        return sorted(int(m.group(1)) for m in found if m)

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
        """Write the state after ``step`` optimizer steps, then drop checkpoints that are no longer needed."""
        path = self.path(step)
        with replacing_folder(path) as temporary:
            save_file(_tensors(module.state_dict()), temporary / MODEL_FILE)
            save_file(optimizer_tensors(module, optimizer), temporary / OPTIMIZER_FILE)
            if ema is not None:
                save_file(_tensors(ema.state_dict()), temporary / EMA_FILE)
            content = json.dumps({"step": step, **state}, indent=1)
            (temporary / STATE_FILE).write_text(content, encoding="utf-8")
        self._prune()
        return path

    def mark_best(self, step: int, val_loss: float) -> None:
        """Note which checkpoint had the lowest validation loss."""
        replace_text(self.folder / BEST_FILE, json.dumps({"step": step, "val_loss": val_loss}) + "\n")
        self._prune()

    def best(self) -> dict[str, Any] | None:
        """``{"step": ..., "val_loss": ...}`` of the best checkpoint, if one is marked."""
        path = self.folder / BEST_FILE
        return json.loads(path.read_text()) if path.is_file() else None

    def _prune(self) -> None:
        best = (self.best() or {}).get("step")
        for step in self.steps()[: -self.keep]:
            if step != best:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def load(self, step: int) -> Loaded:
        """Read a checkpoint.

        Raises:
            UserError: It is damaged.
        """
        path = self.path(step)
        try:
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            model, optimizer = load_file(path / MODEL_FILE), load_file(path / OPTIMIZER_FILE)
            ema = load_file(path / EMA_FILE) if (path / EMA_FILE).is_file() else None
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"checkpoint {path} is damaged: {str(error).splitlines()[0]}") from error
        return Loaded(step, model, optimizer, ema, state)


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
    return _tensors(
        {
            f"{kind}.{names[id(p)]}": torch.as_tensor(value)
            for p, values in optimizer.state.items()
            for kind, value in values.items()
        }
    )


def load_optimizer_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], source: str | Path
) -> None:
    """The inverse of :func:`optimizer_tensors`.

    Raises:
        UserError: State is missing for a trainable parameter, or left over.
    """
    left = dict(tensors)
    kinds = {k.split(".", 1)[0] for k in tensors}
    for name, parameter in module.named_parameters():
        found = {k.removesuffix(f".{name}"): v for k, v in tensors.items() if k.split(".", 1)[1] == name}
        for kind in found:
            del left[f"{kind}.{name}"]
        if parameter.requires_grad and kinds - found.keys():
            lacking = ", ".join(sorted(kinds - found.keys()))
            raise UserError(f"{source} lacks the optimizer state of {name}: {lacking}")
        if found:
            # The step counter belongs where a fused optimizer reads it; moments beside their parameter.
            # A copy: what safetensors gives may be the file itself, mapped into memory.
            optimizer.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in found.items()}
    if left:
        raise UserError(f"{source} has optimizer state of unknown parameters: {', '.join(sorted(left)[:4])}")


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Strict loading; missing and extra tensors are named."""
    load_strict(module, tensors, source)
