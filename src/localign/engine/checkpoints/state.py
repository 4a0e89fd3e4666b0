"""The content of a checkpoint's JSON file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from localign.engine.checkpoints.checksums import FileInfo, sealed_text
from localign.engine.nonfinite import GuardState
from localign.results import BestCheckpoint
from localign.text.printing import printable

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


def check_types(state: Mapping[str, Any]) -> None:
    """Check the types of the fields that a checkpoint's JSON file has; fields of older versions may be missing.

    Raises:
        ValueError: A field has a value of another type; the line names it.
    """
    for name, is_good in _CHECKS.items():
        if name in state and not is_good(state[name]):
            raise ValueError(f"{name} is {printable(state[name])!r:.60}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _maps(value: Any, is_good: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_good, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_best(value: Any) -> bool:
    """Whether a value from JSON is a :class:`~localign.results.BestCheckpoint`."""
    return isinstance(value, dict) and type(value.get("step")) is int and _is_number(value.get("val_loss"))


def _is_guard(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("in_a_row")) is int
        and isinstance(value.get("skipped"), list)
        and all(type(step) is int for step in value["skipped"])
    )


def _is_validation(value: Any) -> bool:
    return isinstance(value, dict) and (
        not value or (type(value.get("step")) is int and _maps(value.get("metrics"), _is_number))
    )


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, dict),
    "fingerprint": lambda value: _maps(value, _is_text),
    "task": lambda value: isinstance(value, dict),
    "guard": _is_guard,
    "digest": lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{1,16}", value)),
    "bad_images": lambda value: _maps(value, _is_text),
    "seconds": lambda value: _is_number(value) and value >= 0,
    "best": lambda value: value is None or is_best(value),
    "validation": _is_validation,
}
