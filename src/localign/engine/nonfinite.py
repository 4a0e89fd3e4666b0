"""Skips steps whose loss or gradient is not finite (appendix C of the paper, "Training instability")."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

from safetensors.torch import save_file

from localign.engine.batch import tensors_of
from localign.errors import RunFailure
from localign.files import replacing

MAX_IN_A_ROW = 3
MAX_SAVED_STEPS = 20
"""Batches of the last this many skipped steps are kept on disk."""
FOLDER = "nonfinite"


class GuardState(TypedDict):
    """State of a :class:`NonFiniteGuard`."""

    in_a_row: int
    """Skipped steps since the last step that was not skipped."""
    skipped: list[int]
    """All skipped steps, counted from 1."""


class NonFiniteGuard:
    """Counts skipped steps, saves their batches for replay, and ends a run that does not recover.

    Args:
        folder: The run folder.
        rank: This process's rank, part of the names of the saved files.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder / FOLDER
        self.rank = rank
        self.in_a_row = 0
        self.skipped: list[int] = []

    def passed(self) -> None:
        """Record a step with a finite loss and gradient."""
        self.in_a_row = 0

    def skip(self, step: int, batches: list[Any], loss: float, grad_norm: float) -> None:
        """Record a skipped step and save the tensors of its batches (named tuples).

        Raises:
            RunFailure: This is the third skipped step in a row.
        """
        self.in_a_row += 1
        self.skipped.append(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, batch in enumerate(batches):
            tensors = {name: t.cpu().contiguous() for name, t in tensors_of(batch).items()}
            facts = {"step": step, "rank": self.rank, "loss": str(loss), "grad_norm": str(grad_norm)}
            with replacing(self.folder / f"{_stem(step, self.rank)}{number}.safetensors") as path:
                save_file(tensors, path, metadata={"localign": json.dumps(facts)})
        self._drop_old()
        if self.in_a_row >= MAX_IN_A_ROW:
            raise RunFailure(
                f"loss or gradient not finite in {self.in_a_row} steps in a row (last: step {step}, loss {loss}, "
                f"gradient norm {grad_norm}); their batches are in {self.folder}. Try soft-capped attention, "
                "a lower learning rate, a larger --eps or --weight-decay 0.1"
            )

    def _drop_old(self) -> None:
        for step in self.skipped[-MAX_SAVED_STEPS - 1 : -MAX_SAVED_STEPS]:
            for path in self.folder.glob(f"{_stem(step, self.rank)}*"):
                path.unlink(missing_ok=True)

    def state_dict(self) -> GuardState:
        return {"in_a_row": self.in_a_row, "skipped": self.skipped}

    def load_state_dict(self, state: GuardState) -> None:
        self.in_a_row, self.skipped = int(state["in_a_row"]), list(state["skipped"])


def _stem(step: int, rank: int) -> str:
    return f"step-{step:07d}-rank-{rank}-batch-"
