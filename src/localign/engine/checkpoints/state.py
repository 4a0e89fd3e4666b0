"""The content of a checkpoint's JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from localign.engine.checkpoints.checksums import FileInfo, sealed_text
from localign.engine.nonfinite import GuardState
from localign.results import BestCheckpoint

STATE_FILE = "state.json"


class LastValidation(TypedDict, total=False):
    """The latest validation; empty before the first one."""

    step: int
    metrics: dict[str, float]


class RunState(TypedDict):
    """State of the loop."""

    config: dict[str, Any]
    fingerprint: dict[str, str]
    """As :meth:`Task.fingerprint`."""
    task: dict[str, Any]
    """As :meth:`Task.state_dict`."""
    guard: GuardState
    digest: str
    """Digest of all (position, index) pairs so far: 16 hexadecimal digits."""
    bad_images: dict[str, str]
    """Name -> reason of the unreadable images so far."""
    seconds: float
    """Training time."""
    best: BestCheckpoint | None
    validation: LastValidation


class SavedState(RunState, total=False):
    """State of the loop as read from a checkpoint. Older versions wrote no ``files`` and no ``checksum``."""

    step: int
    files: dict[str, FileInfo]
    checksum: str


NEEDED_FIELDS = RunState.__required_keys__ - {"config"}
"""Keys that a resumed run reads."""


def state_text(step: int, state: Mapping[str, Any], files: Mapping[str, FileInfo]) -> str:
    """The text of a checkpoint's JSON file.

    Args:
        step: The checkpoint's step.
        state: JSON-able.
        files: The other files of the checkpoint.
    """
    return sealed_text({"step": step, **state}, files)
