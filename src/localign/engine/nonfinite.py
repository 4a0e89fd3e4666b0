"""What happens when a loss or gradient is not finite (appendix C of the paper, "Training instability")."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from localign.engine.batch import tensors_of
from localign.errors import RunFailure
from localign.files import replacing

MOST_IN_A_ROW = 3
MOST_KEPT = 20
"""Skipped steps whose batches are kept: a long run may skip many."""
FOLDER = "nonfinite"


class NonFiniteGuard:
    """Counts skipped steps, keeps their batches for replay, and ends a run that does not recover.

    Args:
        folder: The run folder.
        rank: Of the batches that are kept.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder / FOLDER
        self.rank = rank
        self.in_a_row = 0
        self.skipped: list[int] = []

    def passed(self) -> None:
        """A step went well."""
        self.in_a_row = 0

    def skip(self, step: int, batches: list[Any], loss: float, grad_norm: float) -> None:
        """Keep the tensors of the batches (named tuples) of a step that is skipped.

        Raises:
            RunFailure: It is the third in a row.
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
        if self.in_a_row >= MOST_IN_A_ROW:
            raise RunFailure(
                f"loss or gradient not finite in {self.in_a_row} steps in a row (last: step {step}, loss {loss}, "
                f"gradient norm {grad_norm}); their batches are in {self.folder}. Try soft-capped attention, "
                "a lower learning rate, a larger --eps or --weight-decay 0.1"
            )

    def _drop_old(self) -> None:
        for step in self.skipped[-MOST_KEPT - 1 : -MOST_KEPT]:
            for path in self.folder.glob(f"{_stem(step, self.rank)}*"):
                path.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.skipped = int(state["in_a_row"]), list(state["skipped"])


def _stem(step: int, rank: int) -> str:
    return f"step-{step:07d}-rank-{rank}-batch-"
